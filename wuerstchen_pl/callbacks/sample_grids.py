"""Image grids at the first step, at intervals and at the end, always of the same few samples."""

import logging
import time
from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.grid_image import render_grid
from wuerstchen_pl.callbacks.restored_modes import restored_modes
from wuerstchen_pl.data.examples import example_batch
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.loggers.images import log_image
from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)


class SampleGrids(L.Callback):
    """Write ``grids/step0001000.png`` from the stage's ``example_grid``, with captions.

    TensorBoard and Weights & Biases get the same images.

    The grids of a run have the same samples: the first of validation, or of training if there are
    none for validation. Training is not affected.

    Args:
        folder: the folder to write to.
        every_steps: steps between two grids; the first is before training, the last at its end.
        num_images: rows of a grid.
    """

    def __init__(self, *, folder: str, every_steps: int, num_images: int = 8) -> None:
        if every_steps < 1 or num_images < 1:
            raise ValueError(
                f"every_steps={every_steps} and num_images={num_images} are out of range; use 1 "
                "or more"
            )
        self.folder, self.every_steps, self.num_images = Path(folder), every_steps, num_images
        self.seconds = 0.0  # time that training waited for grids
        self._drawn_step = -1
        self._rows: Batch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the step of a resumed run as drawn; say if there will be no grids."""
        self._drawn_step, self._rows = trainer.global_step or -1, None
        if not cast(Stage, pl_module).can_draw:
            logger.info("no grids, as Stages B and A are missing (set decoder= to have grids)")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw before the first step, after the callbacks that can refuse a run."""
        if trainer.global_step == 0:
            self._draw(trainer, cast(Stage, pl_module))

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
            self._draw(trainer, cast(Stage, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last step."""
        self._draw(trainer, cast(Stage, pl_module))

    def _draw(self, trainer: L.Trainer, stage: Stage) -> None:
        """Draw in the trainer's precision, once per step; on all processes, for sharded weights."""
        step = trainer.global_step
        if step == self._drawn_step or not stage.can_draw:
            return
        self._drawn_step, start = step, time.perf_counter()
        if self._rows is None:
            rows = example_batch(trainer.datamodule, self.num_images)  # type: ignore[attr-defined]
            self._rows = trainer.strategy.batch_to_device(rows)
        precision = trainer.precision_plugin.val_step_context()
        with stage.frozen.all_on(stage.device), restored_modes(stage), precision:
            stage.eval()
            columns = stage.example_grid(self._rows)
        if trainer.is_global_zero:
            grid = render_grid(columns, self._rows["caption"])
            with atomic_write(self.folder / f"step{step:07d}.png") as temporary:
                grid.save(temporary, format="PNG")
            log_image(trainer.loggers, "grid", grid, step)
        self.seconds += time.perf_counter() - start
