"""Learning-rate schedules: functions of the optimizer step, for ``LambdaLR``."""

import math
from typing import Literal

Decay = Literal["none", "cosine"]


class WarmupCosine:
    """Factor on the learning rate: linear warm-up, then constant or half a cosine down to 0.

    Args:
        warmup_steps: steps until the factor is 1; below 1, a share of ``total_steps``.
        total_steps: number of steps of the run, at which the cosine reaches 0; None or -1 if it is
            unlimited.
        decay: "none" keeps the factor at 1 after the warm-up (paper).

    Raises:
        ValueError: an argument is out of range, or needs ``total_steps``.
    """

    def __init__(
        self,
        *,
        warmup_steps: float = 0,
        total_steps: int | None = None,
        decay: Decay = "none",
    ) -> None:
        is_share = 0 < warmup_steps < 1
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} is out of range; use 0 or more")
        if total_steps in (None, -1) and (is_share or decay == "cosine"):
            key = "decay=cosine" if decay == "cosine" else f"warmup_steps={warmup_steps}"
            raise ValueError(
                f"{key} depends on the length of the run, which is unlimited; set total_steps, or "
                "decay=none and a number of steps for warmup_steps"
            )
        self.total_steps, self.decay = total_steps or 0, decay
        self.warmup_steps = round(warmup_steps * self.total_steps if is_share else warmup_steps)

    def __call__(self, step: int) -> float:
        """Number of finished steps -> factor in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "none":
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return 0.5 * (1 + math.cos(math.pi * progress))
