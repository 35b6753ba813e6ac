"""Chooses worker processes and memory for decoding, by the size of the dataset."""

import os
from collections.abc import Sequence

from wuerstchen_pl.data.ordering.buckets import Size

_MAX_WORKERS, _IMAGES_PER_WORKER = 8, 100
_KEPT_BYTES = 10**9  # per process


def choose_num_workers(num_images: int) -> int:
    """One worker for 100 images, up to 8."""
    return min(_MAX_WORKERS, 1 + num_images // _IMAGES_PER_WORKER)


def fit_in_memory(num_images: int, sizes: Sequence[Size], crop_share: float = 1.0) -> bool:
    """Whether all decoded images take at most 1 GB.

    Args:
        num_images: number of images.
        sizes: (height, width) of their crops in pixels; up to twice as high and wide is decoded.
        crop_share: side of a crop relative to the largest possible one.
    """
    pixels = max(height * width for height, width in sizes) / crop_share**2
    return num_images * pixels * 4 * 3 <= _KEPT_BYTES


def cpu_count() -> int:
    """The number of CPUs available to this process."""
    # sched_getaffinity does not exist on all systems.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
