"""When a run draws images of its current weights, and how it does so without being affected."""

import time
from abc import abstractmethod
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.callbacks.restored_modes import restored_modes
from wuerstchen_pl.stages.stage import Stage


class DrawingCallback(L.Callback):
    """Draw before the first step, every ``every_steps`` steps, at the end, and on ``draw``.

    Args:
        every_steps: steps between two drawings.
    """

    def __init__(self, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self.seconds = 0.0  # time that training waited for images
        self._drawn_step = -1

    def can_draw(self, stage: Stage) -> bool:
        """Whether there is something to draw."""
        return stage.can_draw

    @abstractmethod
    def images(self, trainer: L.Trainer, stage: Stage) -> Any:
        """The images, of the weights of ``stage``; every process calls it, for sharded weights."""

    @abstractmethod
    def write(self, trainer: L.Trainer, images: Any) -> None:
        """Write what ``images`` returned; only the first process calls it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the step of a resumed run as drawn."""
        self._drawn_step = trainer.global_step or -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Draw before the first step, after the callbacks that can refuse a run."""
        if trainer.global_step == 0:
            self.draw(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Draw every ``every_steps`` steps."""
        if trainer.global_step % self.every_steps == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last step."""
        self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw in the trainer's precision, unless this step was drawn; every process calls it."""
        stage, step = cast(Stage, pl_module), trainer.global_step
        if step == self._drawn_step or not self.can_draw(stage):
            return
        self._drawn_step, start = step, time.perf_counter()
        precision = trainer.precision_plugin.val_step_context()
        with stage.frozen.all_on(stage.device), restored_modes(stage), precision:
            stage.eval()
            images = self.images(trainer, stage)
        if trainer.is_global_zero:
            self.write(trainer, images)
        self.seconds += time.perf_counter() - start
