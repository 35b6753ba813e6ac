"""Reconstruction metrics: PSNR and SSIM by torchmetrics."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

Compare = Callable[[Tensor, Tensor], Tensor]
"""A metric: two images (1, 3, H, W) in [0, 1] -> a scalar."""


def psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of one image, in dB."""
    return peak_signal_noise_ratio(reconstruction, original, data_range=1.0)


def ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of one image, at most 1."""
    value = structural_similarity_index_measure(reconstruction, original, data_range=1.0)
    return value[0] if isinstance(value, tuple) else value


def compare_images(
    pairs: Iterable[tuple[Tensor, Tensor]], metrics: dict[str, Compare]
) -> dict[str, list[float]]:
    """Compare batches of (original, reconstruction), image by image.

    Args:
        pairs: two tensors (B, 3, H, W) in [0, 1] each; sizes may differ between batches.
        metrics: name -> metric.

    Returns:
        name -> one value per image.
    """
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for original, reconstruction in pairs:
        for x, y in zip(original.split(1), reconstruction.split(1), strict=True):
            for name, compare in metrics.items():
                values[name].append(float(compare(x, y)))
    return values
