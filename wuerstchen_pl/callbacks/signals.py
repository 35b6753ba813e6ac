"""Signals to a run: save and stop, or draw images now."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.callbacks.drawing import DrawingCallback
from wuerstchen_pl.cli.signals import DRAW_SIGNAL, STOP_SIGNALS

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """A run was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class SignalHandler(L.Callback):
    """Obey signals that any process has received, at the end of a step.

    A stop signal saves a checkpoint and raises ``Preempted``; a second Ctrl-C interrupts
    immediately. ``DRAW_SIGNAL`` draws what each ``DrawingCallback`` draws; training is not
    affected.

    Args:
        every_steps: steps between two exchanges of received signals among several processes, which
            must all obey at the same step.
    """

    def __init__(self, *, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self._stop_signal, self._draw_requested = 0, False
        self._last_step = -1
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers in place of Lightning's, which would not save a checkpoint."""
        self._stop_signal, self._draw_requested = 0, False
        self._last_step = trainer.global_step
        self._previous_handlers = {
            signum: signal.signal(signum, self._receive) for signum in (*STOP_SIGNALS, DRAW_SIGNAL)
        }

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if signum == DRAW_SIGNAL:
            self._draw_requested = True
            logger.info("%s: drawing images after this step", name)
            return
        if self._stop_signal == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop_signal = signum
        logger.info("%s: finishing and saving this step", name)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save and stop, or draw, if any process received a signal.

        Raises:
            Preempted: on all processes at the same step.
        """
        step = trainer.global_step
        if step == self._last_step:  # between two micro-batches
            return
        self._last_step = step
        stop_signal, draw_requested = self._received_by_any(trainer, pl_module.device)
        if stop_signal:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoints):
                    callback.save(trainer)
                    callback.finish()
            raise Preempted(stop_signal)
        if draw_requested:
            self._draw_requested = False
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, DrawingCallback):
                    callback.draw(trainer, pl_module)

    def _received_by_any(self, trainer: L.Trainer, device: torch.device) -> tuple[int, int]:
        """The stop signal, and whether images were requested; 0 for none."""
        received = (self._stop_signal, int(self._draw_requested))
        if trainer.world_size == 1:
            return received
        if trainer.global_step % self.every_steps:
            return 0, 0
        stop_signal, draw_requested = trainer.strategy.reduce(
            torch.tensor(received, device=device), reduce_op="max"
        ).tolist()
        return stop_signal, draw_requested

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}
