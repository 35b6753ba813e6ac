"""The batch contract between data modules and stages."""

from typing import TypedDict, cast

from torch import Tensor


class Batch(TypedDict, total=False):
    """One batch of one process. All of its images have the size of their bucket.

    ``caption``, ``key`` and ``is_unique`` are always present. ``image`` is absent from a cache for
    Stage C; ``semantic``, ``latents``, ``text``, ``empty_text`` and ``size`` come only from caches.

    This is what a stage gets. A loader yields smaller tensors: images in uint8, a quarter of the
    bytes, and cached tensors in the cache's type. The data module's ``on_after_batch_transfer``
    converts them on the stage's device; code that reads images from a loader without a Trainer
    calls ``io.images.to_float``.
    """

    image: Tensor
    """(B, 3, H, W) float32 in [0, 1], RGB: uint8 divided by 255 in IEEE float32."""
    mask: Tensor
    """(B, 1, H, W) float32 in [0, 1], the weight of each pixel in the loss; with ``data.mask``."""
    control: Tensor
    """(B, 3, H, W) float32 in [0, 1], the control images of a ControlNet; with ``data.control``."""
    weight: Tensor
    """(B,) float32, the weight of each image in the loss of training; unless all are 1."""
    caption: list[str]
    """B captions."""
    key: list[str]
    """B sample names."""
    is_unique: bool
    """False if another process has the same samples, as can happen at the end of a validation
    split."""
    semantic: Tensor
    """(B, 16, h, w) float32 semantic latents, as the compressor outputs them."""
    latents: Tensor
    """(B, 4, H / 4, W / 4) float32 latents of Stage A, with unit variance."""
    text: Tensor
    """(B, L, D) float32 text embeddings of the captions."""
    empty_text: Tensor
    """(1, L, D) float32 text embeddings of the empty caption."""
    size: tuple[int, int]
    """(H, W) in pixels of the cached images."""


def num_unique_samples(batch: Batch) -> int:
    """Number of samples of a validation batch; 0 if another process has the same samples.

    A float at run time: Lightning divides the sum of the counts of all processes by their number,
    and would round integers down.
    """
    return cast(int, float(len(batch["caption"]) if batch.get("is_unique", True) else 0))
