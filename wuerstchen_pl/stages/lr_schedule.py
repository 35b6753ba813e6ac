"""Learning-rate schedules: functions of the optimizer step, for ``LambdaLR``."""

import math


class WarmupCosine:
    """Factor on the learning rate: linear warm-up, then constant or half a cosine down to 0.

    Args:
        warmup_steps: steps until the factor is 1.
        total_steps: step at which the cosine reaches 0; None keeps the factor at 1 (paper).
    """

    def __init__(self, *, warmup_steps: int = 0, total_steps: int | None = None) -> None:
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        """Number of finished steps -> factor in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return 0.5 * (1 + math.cos(math.pi * progress))
