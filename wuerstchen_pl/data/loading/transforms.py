"""Crops and resizes images to the size of their bucket.

Randomness is an argument: the crop position is two numbers in [0, 1]. An image is resized until it
just covers its bucket, so a crop can move along one axis only, as far as the aspect ratios differ;
an image of exactly the bucket's ratio is not cropped.
"""

import warnings
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from wuerstchen_pl.data.ordering.buckets import Size

Crop = Literal["random", "center", "saliency"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

CENTER = (0.5, 0.5)
_PROBE = 64  # shorter side in pixels of the thumbnail that is searched for edges


def crop_box(
    height: int, width: int, size: Size, position: tuple[float, float], share: float = 1.0
) -> Box:
    """The largest box of the target's aspect ratio, to the nearest pixel.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        size: (height, width) of the target.
        position: (vertical, horizontal) position in [0, 1]; (0, 0) is top left, CENTER the middle.
        share: factor of the sides of the box; less than 1 gives a smaller crop.
    """
    scale = min(height / size[0], width / size[1]) * share
    high, wide = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = round(position[0] * (height - high)), round(position[1] * (width - wide))
    return left, top, left + wide, top + high


def salient_position(img: np.ndarray, size: Size) -> tuple[float, float]:
    """The ``crop_box`` position of the crop with the strongest edges."""
    height, width = img.shape[:2]
    scale = _PROBE / min(height, width)
    # The longer side is limited to 16 * _PROBE pixels.
    high, wide = (min(max(1, round(side * scale)), 16 * _PROBE) for side in (height, width))
    gray = resize(img, (0, 0, width, height), (high, wide)).mean(axis=2)
    edges = np.hypot(*np.gradient(gray)) if min(gray.shape) > 1 else np.ones_like(gray)
    left, top, right, bottom = crop_box(high, wide, size, (0.0, 0.0))
    return _best_start(edges.sum(1), bottom - top), _best_start(edges.sum(0), right - left)


def _best_start(profile: np.ndarray, length: int) -> float:
    """The start of the window with the largest sum, relative to its range, in [0, 1]."""
    sums = np.convolve(profile, np.ones(length), mode="valid")
    best = np.flatnonzero(sums >= sums.max() * (1 - 1e-9))
    # On ties the middle one, as for an image without edges.
    return 0.5 if len(sums) == 1 else float(best[len(best) // 2]) / (len(sums) - 1)


def resize(img: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """Resize a box of an image with antialiased bicubic interpolation, as PIL does.

    Uses torch on uint8: equal to PIL within rounding, and 5 times as fast with AVX2. Only the box
    is resized, so a strip of 1 x 20,000 pixels does not become a large image.

    Args:
        img: (H, W, 3) uint8.
        box: (left, top, right, bottom) in pixels.
        size: target (height, width).

    Returns:
        (height, width, 3) uint8.
    """
    left, top, right, bottom = box
    part = img[top:bottom, left:right]
    if part.shape[:2] == size:
        return part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array may be read-only, and is only read
        tensor = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()
