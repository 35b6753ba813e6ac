"""Consistency distillation against the exact flow of Gaussian data."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.diffusion.test_dpm_solver import SCHEDULE, best_prediction, flow
from wuerstchen_pl.diffusion.distillation import (
    HUBER,
    JumpTimes,
    jump_loss,
    jump_target,
    jump_times,
    noise_of_step,
)
from wuerstchen_pl.diffusion.sampler import ddim_step
from wuerstchen_pl.diffusion.schedule import CosineSchedule

SIZES = [(1, 1), (1, 256), (3, 7), (4, 16), (8, 32)]


@pytest.mark.parametrize(("student_steps", "teacher_steps"), SIZES)
def test_times_are_those_of_the_teacher_within_a_segment(
    student_steps: int, teacher_steps: int
) -> None:
    total = student_steps * teacher_steps
    t = torch.cat([torch.rand(1000), torch.tensor([1e-6, 0.001, 1.0]), torch.arange(1, 9) / 8])
    times = jump_times(t, student_steps=student_steps, teacher_steps=teacher_steps)
    assert ((times.t >= t) | torch.isclose(times.t, t)).all()
    assert (times.t - t <= 1 / total + 1e-6).all()
    assert torch.allclose(times.t - times.t_teacher, torch.full_like(t, 1 / total), atol=1e-6)
    boundaries = torch.linspace(0, 1, student_steps + 1)
    # the last boundary below t, to the bit, as the sampler's times are compared with it
    below = [max(b for b in boundaries.tolist() if b < s - 1e-6) for s in times.t.tolist()]
    assert torch.allclose(times.end, torch.tensor(below), atol=1e-6)
    is_last = torch.isclose(times.t_teacher, times.end, atol=1e-6)
    assert torch.equal(is_last, times.t_teacher == times.end)


@pytest.mark.parametrize(("student_steps", "teacher_steps"), SIZES)
def test_the_noise_of_a_step_leads_to_its_end(student_steps: int, teacher_steps: int) -> None:
    schedule, total = CosineSchedule(), student_steps * teacher_steps
    grid = torch.arange(1, total + 1) / total
    times = jump_times(grid, student_steps=student_steps, teacher_steps=teacher_steps)
    rng = torch.Generator().manual_seed(0)
    xt, x_end = torch.randn(2, total, 3, generator=rng)
    noise = noise_of_step(schedule, xt, times.t, x_end, times.end)
    actual = ddim_step(schedule, xt, times.t, times.end, noise)
    # the noise is large where the schedule hardly changes, and float32 rounds it
    torch.testing.assert_close(actual, x_end, atol=1e-3, rtol=1e-3)


def exact_student(xt: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """The noise of a student that follows the exact flow to the end of its segment."""
    rows = zip(xt, t, end, strict=True)
    x_end = torch.stack([flow(x, float(start), float(stop)) for x, start, stop in rows])
    return noise_of_step(SCHEDULE, xt, t, x_end, end)


def target_error(teacher_steps: int) -> float:
    """Of the target of an exact student, relative to its own prediction."""
    t = torch.tensor([1.0, 0.8, 0.75, 0.6, 0.5, 0.3], dtype=torch.float64)
    steps = [round(float(s) * 4 * teacher_steps) for s in t]
    grid = jump_times(
        (torch.tensor(steps) - 0.5) / (4 * teacher_steps), student_steps=4,
        teacher_steps=teacher_steps,
    )  # fmt: skip
    times = JumpTimes(*(s.double() for s in grid))
    xt = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def student(x: Tensor, s: Tensor) -> Tensor:
        inside = torch.where(s > times.end, s, times.end + 1e-3)  # where no jump is needed
        return exact_student(x, inside, times.end)

    target = jump_target(SCHEDULE, xt, times, teacher=best_prediction_of_rows, student=student)
    x_end = ddim_step(SCHEDULE, xt, times.t, times.end, target)
    rows = zip(xt, times.t, times.end, strict=True)
    exact = torch.stack([flow(x, float(start), float(stop)) for x, start, stop in rows])
    return float((x_end - exact).abs().max())


def best_prediction_of_rows(xt: Tensor, t: Tensor) -> Tensor:
    return best_prediction(xt, t[:, None])


def test_the_exact_flow_is_what_a_student_learns() -> None:
    """Its own jumps are its targets, but for the error of one step of the teacher, O(h^2)."""
    errors = [target_error(steps) for steps in (4, 8, 16, 32)]
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 1e-3
    assert rates[-1] == pytest.approx(2, abs=0.3)


def test_at_the_end_of_a_segment_the_target_is_the_teachers_prediction() -> None:
    schedule = CosineSchedule()
    times = jump_times(torch.tensor([0.3, 0.9]), student_steps=5, teacher_steps=1)
    xt = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() + t[:, None]

    def unused(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 1e3)

    target = jump_target(schedule, xt, times, teacher=teacher, student=unused)
    torch.testing.assert_close(target, teacher(xt, times.t), atol=1e-5, rtol=1e-5)


def test_a_loss_is_the_error_of_x0_within_a_limit() -> None:
    schedule = CosineSchedule()
    t = torch.tensor([0.05, 0.5, 0.8, 1.0])
    xt, noise, wrong = torch.randn(3, 4, 1000, generator=torch.Generator().manual_seed(0))
    x0, other = (schedule.predict_x0(xt, t, n) for n in (noise, wrong))
    error_of_x0 = (x0 - other).square().mean(dim=1)
    loss = jump_loss(schedule, t, (noise - wrong).square().mean(dim=1))
    expected = (error_of_x0 + HUBER**2).sqrt() - HUBER
    torch.testing.assert_close(loss[:3], expected[:3])
    assert loss[3] < 0.06 * expected[3]
    tiny = jump_loss(schedule, t, torch.full((4,), 1e-8))
    snr = schedule.alpha_bar(t) / (1 - schedule.alpha_bar(t))
    torch.testing.assert_close(tiny[:3], (1e-8 / snr / (2 * HUBER))[:3], rtol=1e-2, atol=1e-9)
