"""How well pictures come back: PSNR and SSIM by torchmetrics."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)


def reconstruction(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Measure batches of (original, reconstruction); sizes may differ from batch to batch.

    Args:
        pairs: two (B, 3, H, W) in [0, 1] each.

    Returns:
        ``psnr`` in dB and ``ssim``, the means over pictures, and ``pictures``.

    Raises:
        ValueError: if there is no batch.
    """
    psnr, ssim = [], []
    for original, back in pairs:
        for x, y in zip(original.split(1), back.split(1), strict=True):
            psnr.append(peak_signal_noise_ratio(y, x, data_range=1.0))
            ssim.append(structural_similarity_index_measure(y, x, data_range=1.0))
    if not psnr:
        raise ValueError("no picture to measure; the data's split is empty")
    means = [float(torch.stack([torch.as_tensor(v) for v in m]).mean()) for m in (psnr, ssim)]
    return {"psnr": means[0], "ssim": means[1], "pictures": len(psnr)}
