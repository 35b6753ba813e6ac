"""Image grids at the first step, at intervals and at the end, always of the same few samples."""

import logging
from pathlib import Path
from typing import cast

import lightning as L
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.drawing import DrawingCallback
from wuerstchen_pl.callbacks.grid_image import render_grid
from wuerstchen_pl.data.examples import example_batch
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.loggers.images import log_image
from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)


class SampleGrids(DrawingCallback):
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
        super().__init__(every_steps=every_steps)
        self.folder, self.num_images = Path(folder), num_images
        self._rows: Batch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See ``DrawingCallback``; say if there will be no grids."""
        super().on_train_start(trainer, pl_module)
        self._rows = None
        if not cast(Stage, pl_module).can_draw:
            logger.info("no grids, as Stages B and A are missing (set decoder= to have grids)")

    def images(self, trainer: L.Trainer, stage: Stage) -> dict[str, Tensor]:
        """The columns of a grid."""
        if self._rows is None:
            rows = example_batch(trainer.datamodule, self.num_images)  # type: ignore[attr-defined]
            self._rows = trainer.strategy.batch_to_device(rows)
        return stage.example_grid(self._rows)

    def write(self, trainer: L.Trainer, images: dict[str, Tensor]) -> None:
        """Write and log the grid."""
        assert self._rows is not None
        step, grid = trainer.global_step, render_grid(images, self._rows["caption"])
        with atomic_write(self.folder / f"step{step:07d}.png") as temporary:
            grid.save(temporary, format="PNG")
        log_image(trainer.loggers, "grid", grid, step)
