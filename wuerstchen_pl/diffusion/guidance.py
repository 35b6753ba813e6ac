"""Classifier-free guidance, and two ways to keep large scales from oversaturating images."""

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
    """Values up to 1 turn guidance off, and no unconditional prediction is computed."""
    rescale: float = 0.0
    """Factor in [0, 1] by which the guided prediction is rescaled toward the standard deviation of
    the conditional one (Lin et al. 2023, arXiv 2305.08891, Eq. 15 and 16)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times [lowest, highest] at which to guide (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""

    def __post_init__(self) -> None:
        if len(self.interval) != 2:
            raise ValueError(f"guidance_interval={self.interval} is not an interval; use two times")
        lowest, highest = self.interval
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale={self.scale} is not finite; use 4, or 0 for none")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale} is out of range; use 0 to 1")
        if not 0 <= lowest < highest <= 1:
            raise ValueError(
                f"guidance_interval=({lowest}, {highest}) is empty; use two increasing times in "
                "[0, 1]"
            )

    @property
    def on(self) -> bool:
        """Whether any step needs an unconditional prediction."""
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
