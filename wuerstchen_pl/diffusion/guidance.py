"""Classifier-free guidance, and two ways to keep a strong one from burning the image."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """uncond + scale (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598).

    Raises:
        ValueError: if a number is out of its range.
    """

    scale: float = 1.0
    """Up to 1 there is no guidance, and nothing unconditional is asked for."""
    rescale: float = 0.0
    """Share, in [0, 1], by which the prediction is brought back to the conditional one's standard
    deviation (Lin et al. 2023, arXiv 2305.08891, Eq. 15 and 16)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times [least, greatest] in which to guide (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""

    def __post_init__(self) -> None:
        if len(self.interval) != 2:
            raise ValueError(f"guidance_interval={self.interval} is not an interval; use two times")
        least, greatest = self.interval
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale={self.scale} is not a number; use 4, or 0 for none")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale} is out of range; use 0 to 1")
        if not 0 <= least < greatest <= 1:
            raise ValueError(
                f"guidance_interval=({least}, {greatest}) is empty; use two rising times in [0, 1]"
            )

    @property
    def on(self) -> bool:
        """Whether anything unconditional is asked for at all."""
        return self.scale > 1

    def at(self, t: float) -> bool:
        """Whether to guide at time ``t``."""
        return self.on and self.interval[0] <= t <= self.interval[1]

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Two predictions, (B, ...) each -> the guided one."""
        guided = torch.lerp(unconditional, conditional, self.scale)
        if not self.rescale:
            return guided
        axes = tuple(range(1, guided.ndim))
        factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return torch.lerp(guided, guided * factor, self.rescale)
