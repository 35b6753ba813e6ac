"""How well images come back: PSNR and SSIM by torchmetrics."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

Compare = Callable[[Tensor, Tensor], Tensor]
"""Two (1, 3, H, W) in [0, 1] -> one number."""


def psnr(original: Tensor, back: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of one image, in dB."""
    return peak_signal_noise_ratio(back, original, data_range=1.0)


def ssim(original: Tensor, back: Tensor) -> Tensor:
    """Structural similarity of one image, at most 1."""
    found = structural_similarity_index_measure(back, original, data_range=1.0)
    return found[0] if isinstance(found, tuple) else found


def compare_images(
    pairs: Iterable[tuple[Tensor, Tensor]], by: dict[str, Compare]
) -> dict[str, list[float]]:
    """Compare batches of (original, reconstruction), image by image.

    Args:
        pairs: two (B, 3, H, W) in [0, 1] each; sizes may differ from batch to batch.
        by: name -> what compares.

    Returns:
        name -> a number for each image.
    """
    found: dict[str, list[float]] = {name: [] for name in by}
    for original, back in pairs:
        for x, y in zip(original.split(1), back.split(1), strict=True):
            for name, compare in by.items():
                found[name].append(float(compare(x, y)))
    return found
