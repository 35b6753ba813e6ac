"""Multistep consistency distillation: one step of a student does what many of a teacher do.

Heek et al. 2024 (arXiv 2403.06807, Algorithm 1). [0, 1] is divided into as many segments as the
student takes steps. From any time of a segment, the student jumps to its end by one DDIM step, and
learns that a jump gives the same as a DDIM step of the teacher and a jump from there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import ddim_step
from wuerstchen_pl.diffusion.schedule import CosineSchedule, expand_like

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""Noised latents (B, ...) and their times (B,) -> the predicted noise."""
MAX_WEIGHT = 25.0
HUBER = 0.03
"""Root mean square errors of x_0 below it count as squares."""
MAX_TEACHER_STEPS = 256
"""From t = 1 to 0; with more, the clamped schedule does not change in the last one."""


class JumpTimes(NamedTuple):
    """(B,) each: ``t`` > ``t_teacher`` >= ``end``."""

    t: Tensor
    t_teacher: Tensor
    """After a step of the teacher."""
    end: Tensor
    """Of the segment."""


def jump_times(t: Tensor, *, student_steps: int, teacher_steps: int) -> JumpTimes:
    """The times of a jump from ``t``, (B,) in (0, 1], rounded up to the times of the teacher.

    Args:
        t: see above.
        student_steps: number of segments.
        teacher_steps: in each segment.
    """
    total = student_steps * teacher_steps
    index = (t.float() * total).ceil().clamp(1, total)
    segment = ((index - 1) / teacher_steps).floor()
    return JumpTimes(index / total, (index - 1) / total, segment / student_steps)


def jump_loss(schedule: CosineSchedule, t: Tensor, errors: Tensor) -> Tensor:
    """The loss of each jump, (B,) float32: pseudo-Huber of its weighted error.

    An error of the noise makes one of x_0 whose square is 1 / SNR times as large; this weight is at
    most 25, as it is 10^4 at t = 1. Up to a factor, it is min-SNR (Hang et al. 2023, arXiv
    2303.09556) with gamma = 1 / 25. A student learns from its own predictions, and with squared
    errors a few bad ones can make it diverge (Song & Dhariwal 2023, arXiv 2310.14189).

    Args:
        schedule: the noise process.
        t: (B,) times.
        errors: (B,) mean squared errors of the predicted noise.
    """
    alpha_bar = schedule.alpha_bar(t)
    weighted = errors * ((1 - alpha_bar) / alpha_bar).clamp(max=MAX_WEIGHT)
    return (weighted + HUBER**2).sqrt() - HUBER


def jump_target(
    schedule: CosineSchedule,
    xt: Tensor,
    times: JumpTimes,
    *,
    teacher: PredictNoise,
    student: PredictNoise,
) -> Tensor:
    """The noise that the student should predict at ``times.t``, in the shape of ``xt``.

    Args:
        schedule: the noise process.
        xt: (B, ...) at ``times.t``.
        times: of the jumps.
        teacher: predicts the noise of a step.
        student: predicts the noise of a jump.
    """
    x = ddim_step(schedule, xt, times.t, times.t_teacher, teacher(xt, times.t))
    jumped = ddim_step(schedule, x, times.t_teacher, times.end, student(x, times.t_teacher))
    x_end = torch.where(expand_like(times.t_teacher > times.end, x), jumped, x)
    return noise_of_step(schedule, xt, times.t, x_end, times.end)


def noise_of_step(
    schedule: CosineSchedule, xt: Tensor, t: Tensor, x_next: Tensor, t_next: Tensor
) -> Tensor:
    """The noise with which ``ddim_step`` leads from ``xt`` at ``t`` to ``x_next`` at ``t_next``."""
    alpha_bar, alpha_bar_next = (expand_like(schedule.alpha_bar(s), xt) for s in (t, t_next))
    ratio = (alpha_bar_next / alpha_bar).sqrt()
    per_noise = (1 - alpha_bar_next).sqrt() - ratio * (1 - alpha_bar).sqrt()
    return (x_next - ratio * xt) / per_noise
