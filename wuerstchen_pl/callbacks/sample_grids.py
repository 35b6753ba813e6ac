"""Labeled image grids at every validation: what a stage makes of the same few images."""

from pathlib import Path

import lightning as L
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wuerstchen_pl.callbacks.step_profile import first_rows
from wuerstchen_pl.io.images import to_pil

LABEL_HEIGHT = 16
GAP = 2


def render_grid(columns: dict[str, Tensor]) -> Image.Image:
    """Columns of images under their labels -> one image.

    Args:
        columns: label -> (B, 3, H, W) in [0, 1]; all of one shape.
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
        folder: where they go.
        num_images: rows of a grid, from the first validation batch.
    """

    def __init__(self, *, folder: str, num_images: int = 8) -> None:
        self.folder, self.num_images = Path(folder), num_images

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the grid of the first batch: on all processes, which may share the weights."""
        if batch_idx != 0 or trainer.sanity_checking:
            return
        rows = first_rows(batch, self.num_images)
        columns = pl_module.example_grid(rows)  # type: ignore[operator]
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            render_grid(columns).save(self.folder / f"step{trainer.global_step:07d}.png")
