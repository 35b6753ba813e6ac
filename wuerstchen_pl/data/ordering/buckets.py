"""Aspect buckets: which sizes a batch may have, and which of them an image goes to."""

import math
from collections.abc import Sequence
from typing import Literal

from wuerstchen_pl.data.sources.source import Sample, unit_hash

Size = tuple[int, int]  # (height, width) in pixels
Policy = Literal["area", "sizes", "paper"]

# Width / height, from 1:2 to 2:1. What falls between two of them is cropped to the nearer one.
DEFAULT_RATIOS = (1 / 2, 4 / 7, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 7 / 4, 2.0)
# Appendix E.3: the compressor sees 768 x 1280, 1280 x 768 or 768 x 768.
PAPER_RATIOS = (3 / 5, 1.0, 5 / 3)


class Buckets:
    """The sizes that batches may have.

    Args:
        policy: "area" makes a size of each ratio, with about the area of image_size^2; "sizes"
            takes a list of them; "paper" has the three sizes of phase 3, whose shorter side is
            image_size, and draws one for each batch, whatever the images' ratios.
        image_size: in pixels; see `policy`.
        multiple: both sides are multiples of this many pixels.
        ratios: width / height of "area"; None takes DEFAULT_RATIOS.
        sizes: (height, width) pairs of "sizes".
        seed: of the draws of "paper".

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
                f"data.ratios={list(ratios)} is of data.buckets=area, but that is {policy}: "
                "remove one of them."
            )
        if (sizes is not None) != (policy == "sizes"):
            raise ValueError(
                f"data.sizes={sizes and [list(s) for s in sizes]} and data.buckets={policy} "
                "disagree: give data.sizes with data.buckets=sizes, and only with it."
            )
        if policy == "sizes":
            self.sizes = _checked_sizes(sizes or (), multiple)
        elif policy == "paper":
            _check_image_size(image_size, multiple)
            long = round(image_size * max(PAPER_RATIOS) / multiple) * multiple
            self.sizes = [(image_size, image_size), (image_size, long), (long, image_size)]
        else:
            self.sizes = area_sizes(image_size, multiple, ratios)
        self.policy, self.seed = policy, seed

    def place(self, sample: Sample, batch: int) -> Size:
        """Return an image's size, in case that it goes into the batch of this number."""
        if self.policy == "paper":
            return self.sizes[int(unit_hash(f"{self.seed}/size/{batch}") * len(self.sizes))]
        return nearest(sample.width, sample.height, self.sizes)

    def enlargement(self, sample: Sample) -> float:
        """How many times larger an image has to become; below 1 it shrinks.

        Of "paper", for its square: the long sizes would need more of any image that is square.
        """
        if self.policy == "paper":
            return enlargement(sample, self.sizes[0])
        return enlargement(sample, self.place(sample, 0))


def area_sizes(image_size: int, multiple: int, ratios: Sequence[float] | None = None) -> list[Size]:
    """List the sizes of about one area, sorted, each once.

    Args:
        image_size: side in pixels of the square that every size has about the area of.
        multiple: both sides are multiples of this many pixels.
        ratios: wanted width / height; None takes DEFAULT_RATIOS.

    Raises:
        ValueError: `multiple` does not divide `image_size`, or a ratio is not positive.
    """
    _check_image_size(image_size, multiple)
    chosen = DEFAULT_RATIOS if ratios is None else tuple(ratios)
    if not chosen or min(chosen) <= 0:
        raise ValueError(
            f"data.ratios is {list(chosen)}: give widths over heights above 0, "
            "such as [0.5, 1.0, 2.0], or null for the usual ones."
        )

    def side(length: float) -> int:
        return max(round(length / multiple), 1) * multiple

    return sorted(
        {(side(image_size / math.sqrt(r)), side(image_size * math.sqrt(r))) for r in chosen}
    )


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the size whose ratio is nearest to an image's, by the logarithm of the ratio."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - wanted))


def enlargement(sample: Sample, size: Size) -> float:
    """How many times larger an image has to become to cover a size; below 1 it shrinks."""
    return max(size[0] / sample.height, size[1] / sample.width)


def _check_image_size(image_size: int, multiple: int) -> None:
    if multiple < 1:
        raise ValueError(f"data.bucket_multiple is {multiple} pixels: give 1 or more.")
    if image_size < multiple or image_size % multiple:
        lower = max(image_size // multiple, 1) * multiple
        raise ValueError(
            f"data.image_size is {image_size} pixels, not a multiple of "
            f"data.bucket_multiple={multiple}: give {lower} or {lower + multiple}."
        )


def _checked_sizes(sizes: Sequence[Sequence[int]], multiple: int) -> list[Size]:
    for size in sizes:
        if len(size) != 2 or any(side < multiple or side % multiple for side in size):
            raise ValueError(
                f"data.sizes holds {list(size)}, but each must be [height, width] in multiples of "
                f"data.bucket_multiple={multiple} pixels: change it."
            )
    if not sizes:
        raise ValueError("data.sizes is empty: give [[height, width], ...] in pixels.")
    return sorted({(size[0], size[1]) for size in sizes})
