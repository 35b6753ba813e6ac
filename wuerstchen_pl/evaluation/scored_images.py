"""Images with scores of each, as the page and the CSV files of a report show them."""

import base64
import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from wuerstchen_pl.evaluation.image_folder import ImageFolder

CSV_FILES = {"scores.csv", "val_losses.csv", "train_losses.csv"}
THUMBNAIL = 96
"""Largest side in pixels."""


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """Images and scores, all in the same order."""

    file: str
    """Name of the CSV file."""
    names: Sequence[str]
    """File names, or keys of samples."""
    prompts: Sequence[str]
    """Prompts or captions; empty strings if they are unknown."""
    sources: Sequence[str]
    """Addresses for HTML."""
    scores: Mapping[str, Sequence[float]]
    """Name of a score -> its values."""

    def csv(self) -> str:
        """A row per image."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["file", "prompt", *self.scores])
        rows.writerows(zip(self.names, self.prompts, *self.scores.values(), strict=True))
        return text.getvalue()


def in_folder(
    images: ImageFolder, scores: Mapping[str, Sequence[float]], page_folder: Path
) -> ScoredImages:
    """The images of a folder, to which the page links."""
    return ScoredImages(
        file="scores.csv",
        names=[path.name for path in images.paths],
        prompts=images.prompts or [""] * len(images),
        sources=[os.path.relpath(path, page_folder) for path in images.paths],
        scores=scores,
    )


def thumbnail(pixels: Tensor) -> str:
    """(3, H, W) uint8 -> a small JPEG as a ``data:`` address, which the page contains."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
