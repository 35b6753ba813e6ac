"""Signals that stop a run: it finishes the current step, saves a checkpoint, and exits."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """A run was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class PreemptionHandler(L.Callback):
    """When any process receives a signal, save at the end of the step and raise ``Preempted``.

    A second Ctrl-C interrupts immediately.

    Args:
        every_steps: steps between two exchanges of received signals among several processes, which
            must all stop at the same step.
    """

    def __init__(self, *, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self._received = 0
        self._last_step = -1
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers in place of Lightning's, which would not save a checkpoint."""
        self._received, self._last_step = 0, trainer.global_step
        self._previous_handlers = {
            signum: signal.signal(signum, self._receive) for signum in STOP_SIGNALS
        }

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signum
        logger.info("%s: finishing and saving this step", signal.Signals(signum).name)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save and stop if any process received a signal.

        Raises:
            Preempted: on all processes at the same step.
        """
        step = trainer.global_step
        if step == self._last_step:  # between two micro-batches
            return
        self._last_step = step
        if received := self._received_by_any(trainer, pl_module.device):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoints):
                    callback.save(trainer)
                    callback.finish()
            raise Preempted(received)

    def _received_by_any(self, trainer: L.Trainer, device: torch.device) -> int:
        if trainer.world_size == 1:
            return self._received
        if trainer.global_step % self.every_steps:
            return 0
        received = torch.tensor(self._received, device=device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}
