"""Builds the batch of crops that a ``BatchSpec`` describes, without unreadable images.

A batch is a dict; all its images have the size of one bucket:

    image      (B, 3, H, W) uint8, RGB, a quarter of the bytes of the float32 of the batch contract
    caption    list of B str
    key        list of B str, the samples' keys
    is_unique  False if another process has the same samples, as at the end of a validation split
    mask       (B, 1, H, W) uint8, if masks are used; 255 for images without a mask
    control    (B, 3, H, W) uint8, if control images are read
    weight     (B,) float32, unless all weights are 1

B is the batch size, minus the number of unreadable images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.loading.control import crop_control, decode_control
from wuerstchen_pl.data.loading.masks import MaskSource, crop_mask, decode_mask
from wuerstchen_pl.data.loading.transforms import CENTER, Crop, crop_box, resize, salient_position
from wuerstchen_pl.data.ordering.batches import BatchSpec
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.ordering.stream import EpochSample
from wuerstchen_pl.data.sources.source import Sample, SampleError, Source, name_digest
from wuerstchen_pl.io.images import decode_image

Batch = dict[str, Any]


@dataclass(slots=True)
class BatchReport:
    """A worker's statistics of one batch.

    Attributes:
        bad: images that could not be read.
        rows: indices of the readable rows of the spec.
        pixels: total pixels of all decoded images before cropping.
        kept: number of these pixels inside the crops.
    """

    bad: list[SampleError] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    pixels: float = 0.0
    kept: float = 0.0


class _Images(NamedTuple):
    """An image (H, W, 3) of a sample, its mask (H, W) and its control image (H, W, 3)."""

    image: np.ndarray
    mask: np.ndarray | None
    control: np.ndarray | None


class _Row(NamedTuple):
    """A readable sample, its crop and its caption."""

    sample: Sample
    crop: _Images
    caption: str


class ImageBatchDataset(Dataset[tuple[Batch, BatchReport]]):
    """Builds the batch of a ``BatchSpec``.

    Args:
        source: where the encoded images are read from.
        seed: random seed of the crops and captions.
        crop: how training images are cropped.
        keep_decoded: cache every decoded image, by its size, in this process's memory.
        crop_share: side of a crop relative to the largest possible one, in (0, 1].
        captions: what training changes about captions.
        mask: where masks come from; None uses no masks.
        control: read control images, which every sample must have.
    """

    def __init__(
        self,
        *,
        source: Source,
        seed: int,
        crop: Crop,
        keep_decoded: bool,
        crop_share: float = 1.0,
        captions: Captions | None = None,
        mask: MaskSource | None = None,
        control: bool = False,
    ) -> None:
        self.source, self.seed, self.crop = source, seed, crop
        self.crop_share = crop_share
        self.captions = captions or Captions()
        self.mask, self.control = mask, control
        self._decoded: dict[tuple[str, Size], _Images] | None = {} if keep_decoded else None

    def __getitem__(self, spec: BatchSpec) -> tuple[Batch, BatchReport]:
        report = BatchReport()
        rows = self._rows(spec.size, spec.rows, report)
        # An empty batch on a single rank would leave the other ranks waiting.
        for substitute in spec.fallback or ():
            rows = rows or self._rows(spec.size, (substitute,), report)
        if not rows and spec.fallback is not None:
            names = ", ".join(row.sample.name for row in spec.rows[:3])
            raise ValueError(
                f"no image of a batch can be read ({names}, ...; {report.bad[0].where}); "
                "inspect the data with python -m wuerstchen_pl.data check full=true"
            )
        height, width = spec.size
        batch = {
            "image": _stacked([row.crop.image for row in rows], spec.size),
            "caption": [row.caption for row in rows],
            "key": [row.sample.key for row in rows],
            "is_unique": spec.is_unique,
            **weights_of([row.sample for row in rows]),
        }
        if self.mask is not None:
            masks = torch.full((len(rows), 1, height, width), 255, dtype=torch.uint8)
            for number, row in enumerate(rows):
                if row.crop.mask is not None:
                    masks.numpy()[number, 0] = row.crop.mask
            batch["mask"] = masks
        if self.control:
            controls = [cast(np.ndarray, row.crop.control) for row in rows]
            batch["control"] = _stacked(controls, spec.size)
        return batch, report

    def _rows(
        self, size: Size, epoch_samples: tuple[EpochSample, ...], report: BatchReport
    ) -> list[_Row]:
        rows = []
        for number, (sample, epoch) in enumerate(epoch_samples):
            try:
                img, mask, control = self._decode(sample, size)
            except OSError as error:
                report.bad.append(SampleError("unreadable image", f"{sample.name}: {error}"))
                continue
            report.rows.append(number)
            position, caption = self._random_choices(sample, epoch)
            if epoch >= 0 and self.crop == "saliency":
                position = salient_position(img, size)
            height, width = img.shape[:2]
            box = crop_box(height, width, size, position, self.crop_share)
            report.pixels += height * width
            report.kept += (box[2] - box[0]) * (box[3] - box[1])
            crop = _Images(
                resize(img, box, size),
                None if mask is None else crop_mask(mask, (height, width), box, size),
                None if control is None else crop_control(control, (height, width), box, size),
            )
            rows.append(_Row(sample, crop, caption))
        return rows

    def _decode(self, sample: Sample, size: Size) -> _Images:
        """The images of a sample, large enough for a size."""
        key = sample.name, size
        if self._decoded is not None and key in self._decoded:
            return self._decoded[key]
        height, width = (math.ceil(side / self.crop_share) for side in size)
        data, cover = self.source.read(sample), (height, width)
        decoded = _Images(
            decode_image(data, cover),
            decode_mask(self.source, sample, data, self.mask),
            decode_control(self.source, sample, cover) if self.control else None,
        )
        if self._decoded is not None:
            self._decoded[key] = decoded
        return decoded

    def _random_choices(self, sample: Sample, epoch: int) -> tuple[tuple[float, float], str]:
        """The (top, left) position of the crop, in [0, 1), and the caption."""
        if epoch < 0:
            return CENTER, self.captions.plain(sample.captions[0])
        name = f"{self.seed}/{epoch}/{sample.identity}"
        top, left, choice = hash_uniforms(name, 3)
        caption = self.captions.augmented(sample.captions[int(choice * len(sample.captions))], name)
        return (CENTER if self.crop == "center" else (top, left)), caption


def _stacked(images: Sequence[np.ndarray], size: Size) -> torch.Tensor:
    """B images (H, W, 3) uint8 of a size -> (B, 3, H, W) uint8."""
    stacked = torch.empty(len(images), *size, 3, dtype=torch.uint8)
    for number, image in enumerate(images):
        stacked.numpy()[number] = image
    return stacked.permute(0, 3, 1, 2)


def weights_of(samples: Sequence[Sample]) -> Batch:
    """The entry of a batch with the weights of its samples; none if all are 1."""
    weights = [sample.weight for sample in samples]
    return {} if set(weights) <= {1.0} else {"weight": torch.tensor(weights)}


def hash_uniforms(name: str, count: int) -> list[float]:
    """Up to 8 pseudorandom numbers in [0, 1), a function of ``name``."""
    random_bytes = name_digest(name)
    return [int.from_bytes(random_bytes[4 * i : 4 * i + 4]) / 2**32 for i in range(count)]
