"""Aspect ratio buckets: the possible sizes of a batch, and the assignment of images to them."""

import math
from collections.abc import Sequence
from typing import Literal

from wuerstchen_pl.data.sources.source import Sample, unit_hash

Size = tuple[int, int]  # (height, width) in pixels
Policy = Literal["area", "sizes", "paper"]

# Width / height, from 1:2 to 2:1. An image of another ratio is cropped to the nearest one.
DEFAULT_RATIOS = (1 / 2, 4 / 7, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 7 / 4, 2.0)
# Appendix E.3: the compressor's input is 768 x 1280, 1280 x 768 or 768 x 768.
PAPER_RATIOS = (3 / 5, 1.0, 5 / 3)


class Buckets:
    """The possible sizes of batches.

    Args:
        policy: "area" has one size per ratio, each with an area of about image_size^2; "sizes"
            uses an explicit list; "paper" has the three sizes of the paper's phase 3, with shorter
            side image_size, and draws one at random per batch, whatever the images' ratios.
        image_size: in pixels; see ``policy``.
        multiple: both sides are multiples of this many pixels.
        ratios: width / height of each bucket of "area"; None uses DEFAULT_RATIOS.
        sizes: (height, width) pairs of "sizes".
        seed: random seed of "paper".

    Raises:
        ValueError: a size is not a multiple, or an argument does not belong to the policy.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        image_size: int,
        multiple: int,
        ratios: Sequence[float] | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        if ratios is not None and policy != "area":
            raise ValueError(
                f"ratios={list(ratios)} is of buckets=area, but buckets={policy}; "
                "remove one of them"
            )
        if (sizes is not None) != (policy == "sizes"):
            raise ValueError(
                f"sizes={sizes and [list(s) for s in sizes]} and buckets={policy} "
                "disagree; use sizes with buckets=sizes, and only with it"
            )
        if policy == "sizes":
            self.sizes = _checked_sizes(sizes or (), multiple)
        elif policy == "paper":
            _check_image_size(image_size, multiple)
            long_side = round(image_size * max(PAPER_RATIOS) / multiple) * multiple
            self.sizes = [
                (image_size, image_size),
                (image_size, long_side),
                (long_side, image_size),
            ]
        else:
            self.sizes = area_sizes(image_size, multiple, ratios)
        self._log_ratios = [_log_ratio(size) for size in self.sizes]
        self.policy, self.seed = policy, seed

    def assign(self, sample: Sample, batch: int) -> Size:
        """The bucket of an image in batch number ``batch``, which only "paper" depends on.

        Except for "paper", it is the size with the nearest aspect ratio, on a logarithmic scale.
        """
        if self.policy == "paper":
            return self.sizes[int(unit_hash(f"{self.seed}/size/{batch}") * len(self.sizes))]
        log_ratio = _log_ratio((sample.height, sample.width))
        distances = [abs(other - log_ratio) for other in self._log_ratios]
        return self.sizes[distances.index(min(distances))]

    def enlargement(self, sample: Sample) -> float:
        """The factor by which the bucket of an image upscales it; below 1 it is downscaled.

        For "paper", the factor of the square size: the long ones upscale any square image more.
        """
        if self.policy == "paper":
            return enlargement(sample, self.sizes[0])
        return enlargement(sample, self.assign(sample, 0))


def area_sizes(image_size: int, multiple: int, ratios: Sequence[float] | None = None) -> list[Size]:
    """Sizes of about equal area, sorted, without duplicates.

    Args:
        image_size: side in pixels of the square with about the area of every size.
        multiple: both sides are multiples of this many pixels.
        ratios: target width / height of each size; None uses DEFAULT_RATIOS.

    Raises:
        ValueError: ``multiple`` does not divide ``image_size``, or a ratio is not positive.
    """
    _check_image_size(image_size, multiple)
    chosen = DEFAULT_RATIOS if ratios is None else tuple(ratios)
    if not chosen or min(chosen) <= 0:
        raise ValueError(
            f"ratios={list(chosen)} is invalid; use width / height ratios above 0, "
            "such as [0.5, 1.0, 2.0], or null for the defaults"
        )

    def side(length: float) -> int:
        return max(round(length / multiple), 1) * multiple

    return sorted(
        {(side(image_size / math.sqrt(r)), side(image_size * math.sqrt(r))) for r in chosen}
    )


def enlargement(sample: Sample, size: Size) -> float:
    """The factor that scales an image to cover a size; below 1 it is downscaled."""
    return max(size[0] / sample.height, size[1] / sample.width)


def _log_ratio(size: Size) -> float:
    return math.log(size[1] / size[0])


def _check_image_size(image_size: int, multiple: int) -> None:
    if multiple < 1:
        raise ValueError(f"bucket_multiple={multiple} pixels is out of range; use 1 or more")
    if image_size < multiple or image_size % multiple:
        lower = max(image_size // multiple, 1) * multiple
        raise ValueError(
            f"image_size={image_size} pixels is not a multiple of "
            f"bucket_multiple={multiple}; use {lower} or {lower + multiple}"
        )


def _checked_sizes(sizes: Sequence[Sequence[int]], multiple: int) -> list[Size]:
    for size in sizes:
        if len(size) != 2 or any(side < multiple or side % multiple for side in size):
            raise ValueError(
                f"sizes={[list(s) for s in sizes]} contains {list(size)}; use [height, width] in "
                f"multiples of bucket_multiple={multiple} pixels"
            )
    if not sizes:
        raise ValueError("sizes=[] is empty; use [[height, width], ...] in pixels")
    return sorted({(size[0], size[1]) for size in sizes})
