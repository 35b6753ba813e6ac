"""The training objective of Stages B and C: weighted mean squared error of the predicted noise."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule

P2Form = Literal["paper", "code", "none"]
_MIN_TOTAL = 1e-6  # below that of a mask with a single pixel of 1 / 255


def p2_weight(schedule: CosineSchedule, t: Tensor, form: P2Form) -> Tensor:
    """Weight of each time in the loss (Choi et al. 2022, arXiv 2204.00227).

    Args:
        schedule: the noise process.
        t: (B,) time in [0, 1].
        form: ``code``: 1 / (1 + SNR) = 1 - alpha_bar, as released. ``paper``:
            (1 - alpha_bar) / (1 + alpha_bar), as printed. ``none``: 1.

    Returns:
        (B,) float32.

    Raises:
        ValueError: if ``form`` is unknown.
    """
    alpha_bar = schedule.alpha_bar(t)
    match form:
        case "code":
            return 1 - alpha_bar
        case "paper":
            return (1 - alpha_bar) / (1 + alpha_bar)
        case "none":
            return alpha_bar.new_ones(alpha_bar.shape)
    raise ValueError(f"p2={form!r} is unknown; use 'paper', 'code' or 'none'")


def noise_error(pred: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of each sample, weighted by a mask.

    Args:
        pred: (B, C, h, w) predicted noise.
        noise: true noise, in the shape of ``pred``.
        mask: (B, 1, H, W) in [0, 1], at the size of the images; its mean over the area of a
            position is the position's weight. None weights all positions alike.

    Returns:
        (B,) float32; 0 for a sample whose mask is 0 everywhere.
    """
    errors = F.mse_loss(pred.float(), noise.float(), reduction="none")
    if mask is None:
        return errors.flatten(1).mean(dim=1)
    weights = F.interpolate(mask.float(), errors.shape[-2:], mode="area").expand_as(errors)
    total = weights.flatten(1).sum(dim=1).clamp_min(_MIN_TOTAL)
    return (weights * errors).flatten(1).sum(dim=1) / total


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of (B,) losses, each times its weight; the sum of the weights does not matter.

    So a batch that is divided among processes has the same loss.
    """
    return losses.mean() if weights is None else (losses * weights).mean()
