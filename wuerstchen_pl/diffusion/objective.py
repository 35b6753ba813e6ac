"""The training objective of Stages B and C: weighted mean squared error of the predicted noise."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule

P2Form = Literal["paper", "code", "none"]


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


def noise_error(pred: Tensor, noise: Tensor) -> Tensor:
    """(B, ...) predicted and true noise -> (B,) mean squared error of each sample, float32."""
    return F.mse_loss(pred.float(), noise.float(), reduction="none").flatten(1).mean(dim=1)
