"""What a worker does: from a `Request` to a batch of crops, with what could not be read left out.

A batch is a dict, and every batch has one size, its bucket:

    image    (B, 3, H, W) float32 in [0, 1], RGB
    caption  list of B str
    key      list of B str, the samples' names
    counts   False if another process has the same samples, as some have at the end of a split

B is the batch size, less the images that epoch out unreadable.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from wuerstchen_pl.data.loading.transforms import CENTER, Crop, crop_box, resize, salient_position
from wuerstchen_pl.data.ordering.batches import BatchSpec
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.ordering.stream import EpochSample
from wuerstchen_pl.data.sources.source import Sample, SampleError, Source, name_digest
from wuerstchen_pl.io.images import decode_image

Batch = dict[str, Any]


@dataclass(slots=True)
class BatchReport:
    """What a worker says of a batch.

    Attributes:
        bad: images that could not be read.
        rows: which rows of the request could be.
        pixels: of all images, before they were cropped, as they were decoded.
        kept: how many of these pixels the crops show.
    """

    bad: list[SampleError] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    pixels: float = 0.0
    kept: float = 0.0


class ImageBatchDataset(Dataset[tuple[Batch, BatchReport]]):
    """Builds the batch that a `Request` asks for.

    Args:
        source: where the bytes come from.
        seed: of the crops and of the choice of captions.
        crop: how training crops.
        keep_decoded: keep each image, decoded, in this process's memory.
        crop_share: of the sides of the greatest crop.
    """

    def __init__(
        self, *, source: Source, seed: int, crop: Crop, keep_decoded: bool, crop_share: float = 1.0
    ) -> None:
        self.source, self.seed, self.crop = source, seed, crop
        self.crop_share = crop_share
        self._kept: dict[str, np.ndarray] | None = {} if keep_decoded else None

    def __getitem__(self, request: BatchSpec) -> tuple[Batch, BatchReport]:
        report = BatchReport()
        rows = self._rows(request.size, request.rows, report)
        # A batch that were empty on one rank only would leave the others waiting.
        for other in request.fallback or ():
            rows = rows or self._rows(request.size, (other,), report)
        if not rows and request.fallback is not None:
            names = ", ".join(drawn.sample.name for drawn in request.rows[:3])
            raise ValueError(
                f"no image of a batch can be read ({names} and so on; {report.bad[0].where}): "
                "look at them with python -m wuerstchen_pl.data check full=true."
            )
        height, width = request.size
        images = torch.empty(len(rows), height, width, 3, dtype=torch.uint8)
        for row, (image, _, _) in enumerate(rows):
            images.numpy()[row] = image
        batch = {
            "image": images.permute(0, 3, 1, 2).float().div_(255),
            "caption": [caption for _, caption, _ in rows],
            "key": [key for _, _, key in rows],
            "is_unique": request.is_unique,
        }
        return batch, report

    def _rows(
        self, size: Size, drawn: tuple[EpochSample, ...], report: BatchReport
    ) -> list[tuple[np.ndarray, str, str]]:
        rows = []
        for number, (sample, epoch) in enumerate(drawn):
            try:
                img = self._decoded(sample, size)
            except OSError as error:
                report.bad.append(SampleError("unreadable image", f"{sample.name}: {error}"))
                continue
            report.rows.append(number)
            place, choice = self._chance(sample, epoch)
            if epoch >= 0 and self.crop == "saliency":
                place = salient_position(img, size)
            height, width = img.shape[:2]
            box = crop_box(height, width, size, place, self.crop_share)
            report.pixels += height * width
            report.kept += (box[2] - box[0]) * (box[3] - box[1])
            caption = sample.captions[int(choice * len(sample.captions))]
            rows.append((resize(img, box, size), caption, sample.key))
        return rows

    def _decoded(self, sample: Sample, size: Size) -> np.ndarray:
        if self._kept is None:
            height, width = (math.ceil(side / self.crop_share) for side in size)
            return decode_image(self.source.read(sample), cover=(height, width))
        if sample.name not in self._kept:
            self._kept[sample.name] = decode_image(self.source.read(sample))
        return self._kept[sample.name]

    def _chance(self, sample: Sample, epoch: int) -> tuple[tuple[float, float], float]:
        """Draw the place of a crop and the choice of a caption, all in [0, 1)."""
        if epoch < 0:
            return CENTER, 0.0
        top, left, choice = hash_uniforms(f"{self.seed}/{epoch}/{sample.identity}", 3)
        return (CENTER if self.crop == "center" else (top, left)), choice


def hash_uniforms(name: str, count: int) -> list[float]:
    """Draw up to 8 numbers in [0, 1), a function of `name`."""
    drawn = name_digest(name)
    return [int.from_bytes(drawn[4 * i : 4 * i + 4]) / 2**32 for i in range(count)]
