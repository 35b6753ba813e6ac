"""Masks of images, which weight their pixels in the loss: from files or alpha channels."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from wuerstchen_pl.data.loading.transforms import Box
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.sources.source import Sample, Source
from wuerstchen_pl.io.images import decode_alpha, decode_gray, has_alpha
from wuerstchen_pl.plural import plural

MaskSource = Literal["file", "alpha"]
"""Files ``NAME.mask.png`` beside the images, or the alpha channels of the images."""


def check_mask_files(kind: MaskSource | None, samples: Sequence[Sample]) -> None:
    """Refuse to use mask files if there are none.

    Raises:
        ValueError: naming the key.
    """
    if kind == "file" and not any(sample.mask_size for sample in samples):
        raise ValueError(
            f"data.mask='file', but none of {plural(len(samples), 'training image')} has a mask; "
            "save that of a.jpg as a.mask.png, or set data.mask=null"
        )


def has_mask(source: Source, sample: Sample, kind: MaskSource | None) -> bool:
    """Whether a sample has a mask file, or with ``kind="alpha"`` an alpha channel.

    Raises:
        OSError: it cannot be read.
    """
    return has_alpha(source.read(sample)) if kind == "alpha" else sample.mask_size > 0


def decode_mask(
    source: Source, sample: Sample, image: bytes, kind: MaskSource | None
) -> np.ndarray | None:
    """The mask of a sample, (H, W) uint8 of any size; None if it has none.

    Args:
        source: where its file is read from.
        sample: the sample.
        image: its encoded image.
        kind: where masks come from; None uses no masks.

    Raises:
        OSError: it cannot be read or decoded.
    """
    if kind == "alpha":
        return decode_alpha(image)
    if kind == "file" and sample.mask_size:
        return decode_gray(source.read(sample.mask))
    return None


def crop_mask(mask: np.ndarray, image_size: Size, box: Box, size: Size) -> np.ndarray:
    """The part of a mask in a box of its image, averaged over areas.

    Args:
        mask: (h, w) uint8, of any size.
        image_size: (height, width) of the image.
        box: (left, top, right, bottom) in pixels of the image.
        size: target (height, width).

    Returns:
        (height, width) uint8.
    """
    left, top, right, bottom = box
    whole = F.interpolate(torch.tensor(mask).float()[None, None], image_size, mode="area")
    part = F.interpolate(whole[..., top:bottom, left:right], size, mode="area")
    return part[0, 0].round().to(torch.uint8).numpy()
