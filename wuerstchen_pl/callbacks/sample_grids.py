"""Labeled image grids after every validation, always of the same few samples."""

from pathlib import Path
from typing import cast

import lightning as L
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import first_rows
from wuerstchen_pl.io.images import to_pil
from wuerstchen_pl.stages.stage import Stage

LABEL_HEIGHT = 16
GAP = 2


def render_grid(columns: dict[str, Tensor]) -> Image.Image:
    """One image with a labeled column per batch of images.

    Args:
        columns: label -> (B, 3, H, W) in [0, 1]; all of the same shape.
    """
    font = ImageFont.load_default(size=11)
    first = next(iter(columns.values()))
    rows, _, height, width = first.shape
    column_width = max(width, *(int(font.getlength(label)) + 6 for label in columns)) + GAP
    canvas = Image.new(
        "RGB", (column_width * len(columns), LABEL_HEIGHT + rows * (height + GAP)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for i, (label, images) in enumerate(columns.items()):
        draw.text((i * column_width + 2, 1), label, fill="black", font=font)
        for j, image in enumerate(images):
            corner = (i * column_width, LABEL_HEIGHT + j * (height + GAP))
            canvas.paste(to_pil(image), corner)
    return canvas


class SampleGrids(L.Callback):
    """Write ``grids/step0001000.png`` after each validation, from the stage's ``example_grid``.

    Args:
        folder: the folder to write to.
        num_images: rows of a grid, from the first validation batch.
    """

    def __init__(self, *, folder: str, num_images: int = 8) -> None:
        self.folder, self.num_images = Path(folder), num_images
        self._rows: Batch | None = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first rows of the first batch."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._rows = first_rows(batch, self.num_images)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Render the grid, in the trainer's precision; on all processes, for sharded weights."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        stage = cast(Stage, pl_module)
        precision = trainer.precision_plugin.val_step_context()
        with stage.frozen.all_on(stage.device), precision:
            columns = stage.example_grid(rows)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            render_grid(columns).save(self.folder / f"step{trainer.global_step:07d}.png")
