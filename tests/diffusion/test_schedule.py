"""The noise schedule and training times against their closed forms."""

import math

import pytest
import torch

from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps

SCHEDULE = CosineSchedule()


def test_alpha_bar_equals_its_closed_form_and_is_clamped() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    f = [math.cos(math.pi / 2 * (x + 0.008) / 1.008) ** 2 for x in t.tolist()]
    expected = torch.tensor([0.9999, f[1] / f[0], f[2] / f[0], 1e-4])
    torch.testing.assert_close(SCHEDULE.alpha_bar(t), expected)


def test_the_offset_of_the_schedule_is_that_of_its_closed_form() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    f = [math.cos(math.pi / 2 * (x + 0.5) / 1.5) ** 2 for x in [0.0, *t.tolist()]]
    expected = torch.tensor(f[1:]) / f[0]
    torch.testing.assert_close(CosineSchedule(s=0.5).alpha_bar(t), expected)


def test_half_precision_times_are_computed_with_in_float32() -> None:
    half = torch.tensor([0.11, 0.52, 0.93]).bfloat16()
    assert torch.equal(SCHEDULE.alpha_bar(half), SCHEDULE.alpha_bar(half.float()))
    assert torch.equal(sample_timesteps(half), sample_timesteps(half.float()))


def test_time_stays_float32_in_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        alpha_bar = SCHEDULE.alpha_bar(torch.tensor([0.5001, 0.5002]))
    assert alpha_bar.dtype == torch.float32
    assert alpha_bar[0] != alpha_bar[1]  # they are equal in bfloat16


def test_predict_x0_inverts_add_noise() -> None:
    x0, noise = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 8)
    xt = SCHEDULE.add_noise(x0, t, noise)
    torch.testing.assert_close(SCHEDULE.predict_x0(xt, t, noise), x0, atol=1e-4, rtol=1e-4)


def test_training_times_have_the_published_distribution() -> None:
    u = torch.tensor([0.0, 0.5, 0.9999999])
    torch.testing.assert_close(sample_timesteps(u), torch.tensor([1.0, 0.541, 0.001]))
    many = sample_timesteps(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float((many == 1).float().mean()) == pytest.approx(1 - 0.999 / 1.08, abs=2e-3)
