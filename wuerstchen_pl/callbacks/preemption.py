"""Signals that ask a run to stop: it finishes its step and saves, and can be resumed."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.callbacks.checkpoints import Checkpoints

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what kill, torchrun and Slurm send; what Slurm sends by ``--signal=USR1@300``."""


class Preempted(Exception):
    """A run ended because it was asked to; everything up to now is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class PreemptionHandler(L.Callback):
    """Save at the end of the step in which a signal came to any process, and raise ``Stopped``.

    A second Ctrl-C does not wait for that.

    Args:
        every_steps: steps between two times that several processes ask each other, as they have to
            stop at the same one.
    """

    def __init__(self, *, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self._received = 0
        self._seen_step = -1
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; in place of Lightning, which would lose what was done since the last save."""
        self._received, self._seen_step = 0, trainer.global_step
        self._before = {each: signal.signal(each, self._receive) for each in STOP_SIGNALS}

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
        """Save and stop, if one process was asked to.

        Raises:
            Stopped: on all processes at the same step.
        """
        step = trainer.global_step
        if step == self._seen_step:  # between two micro-batches
            return
        self._seen_step = step
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
        own = torch.tensor(self._received, device=device)
        return int(trainer.strategy.reduce(own, reduce_op="max"))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
