"""Sampling of a distilled prior, whose guidance is built in."""

import warnings

from wuerstchen_pl.models.prior import MAX_STUDENT_STEPS
from wuerstchen_pl.sampling.config import DenoiseConfig


def check_student_steps(steps: float) -> int:
    """The steps that a student was trained for.

    Raises:
        ValueError: if this is not a whole number from 1 to ``MAX_STUDENT_STEPS``.
    """
    if steps not in range(1, MAX_STUDENT_STEPS + 1):
        raise ValueError(f"student_steps={steps} is out of range; use 1 to {MAX_STUDENT_STEPS}")
    return int(steps)


def warn_if_unsuitable(student_steps: int, config: DenoiseConfig) -> None:
    """Warn about guidance, or more steps than a student of ``student_steps`` benefits from."""
    steps = len(config.times) - 1
    if not config.guidance.on and steps <= MAX_STUDENT_STEPS:
        return
    guidance = f"guidance {config.guidance.scale:g}" if config.guidance.on else "no guidance"
    warnings.warn(
        f"this Stage C was distilled for {student_steps} (at most {MAX_STUDENT_STEPS}) steps "
        f"without guidance, not for {steps} with {guidance}; use sample=distilled "
        f"sample.prior_steps={student_steps}, or in Python prior_num_inference_steps="
        f"{student_steps} and prior_guidance_scale=0",
        stacklevel=2,
    )
