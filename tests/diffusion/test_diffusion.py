"""Closed forms of the noise process, the objective and the samplers."""

import math

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
from wuerstchen_pl.diffusion.sampler import generators, guided, randn, sample, timesteps
from wuerstchen_pl.diffusion.schedule import CosineSchedule, draw_time

SCHEDULE = CosineSchedule()
CPU = torch.device("cpu")


def test_alpha_bar_has_its_closed_form_and_its_ends() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    f = [math.cos(math.pi / 2 * (x + 0.008) / 1.008) ** 2 for x in t.tolist()]
    wanted = torch.tensor([0.9999, f[1] / f[0], f[2] / f[0], 1e-4])
    torch.testing.assert_close(SCHEDULE.alpha_bar(t), wanted)


def test_time_stays_float32_in_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        alpha_bar = SCHEDULE.alpha_bar(torch.tensor([0.5001, 0.5002]))
    assert alpha_bar.dtype == torch.float32
    assert alpha_bar[0] != alpha_bar[1]  # bfloat16 could not tell them apart


def test_predict_x0_inverts_add_noise() -> None:
    x0, noise = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 8)
    xt = SCHEDULE.add_noise(x0, t, noise)
    torch.testing.assert_close(SCHEDULE.predict_x0(xt, t, noise), x0, atol=1e-4, rtol=1e-4)


def test_training_times_are_the_published_draw() -> None:
    u = torch.tensor([0.0, 0.5, 0.9999999])
    torch.testing.assert_close(draw_time(u), torch.tensor([1.0, 0.541, 0.001]))
    many = draw_time(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float((many == 1).float().mean()) == pytest.approx(1 - 0.999 / 1.08, abs=2e-3)


@pytest.mark.parametrize(
    ("form", "weight"),
    [("code", lambda a: 1 - a), ("paper", lambda a: (1 - a) / (1 + a)), ("none", lambda a: 1.0)],
)
def test_p2_weight_has_both_forms(form: str, weight: object) -> None:
    t = torch.tensor([0.1, 0.4, 0.9])
    wanted = torch.tensor([weight(a) for a in SCHEDULE.alpha_bar(t).tolist()])  # type: ignore[operator]
    torch.testing.assert_close(p2_weight(SCHEDULE, t, form), wanted)  # type: ignore[arg-type]
    alpha_bar = SCHEDULE.alpha_bar(t)
    snr = alpha_bar / (1 - alpha_bar)
    if form == "code":  # k = gamma = 1 of Choi et al.
        torch.testing.assert_close(p2_weight(SCHEDULE, t, "code"), 1 / (1 + snr))


def test_an_unknown_form_of_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="'paper', 'code' or 'none'"):
        p2_weight(SCHEDULE, torch.tensor([0.5]), "p3")  # type: ignore[arg-type]


def test_noise_error_is_the_mean_of_each_sample() -> None:
    pred = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(noise_error(pred, torch.zeros(2, 2)), torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_perfect_denoiser_leads_to_the_data(method: str) -> None:
    x0 = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    rngs = generators([1, 2, 3])

    def denoise(xt: Tensor, t: Tensor) -> Tensor:  # the noise that leads from x0 to xt
        alpha_bar = SCHEDULE.alpha_bar(t).view(-1, 1, 1, 1)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    noise = randn(x0.shape[1:], rngs, CPU)
    out = sample(denoise, noise, timesteps(10), rngs, schedule=SCHEDULE, method=method)
    # the clamped end of the schedule leaves noise of std 0.01
    torch.testing.assert_close(out, x0, atol=5e-2, rtol=0)


def test_ddpm_keeps_the_variance_of_standard_normal_data() -> None:
    # For x0 ~ N(0, 1) the best prediction of the noise is sqrt(1 - alpha_bar) x_t.
    rngs = generators(range(4))

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        return (1 - SCHEDULE.alpha_bar(t)).sqrt().view(-1, 1, 1, 1) * xt

    noise = randn((8, 32, 32), rngs, CPU)
    out = sample(denoise, noise, timesteps(200), rngs, schedule=SCHEDULE)
    assert float(out.std()) == pytest.approx(1, abs=0.03)


def test_guidance_of_one_is_the_conditional_prediction_and_asks_nothing_else() -> None:
    asked = []

    def conditional(xt: Tensor, t: Tensor) -> Tensor:
        return xt * 2

    def unconditional(xt: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return xt * -1

    x, t = torch.ones(1, 2), torch.ones(1)
    assert torch.equal(guided(conditional, unconditional, 1.0)(x, t), x * 2)
    assert not asked
    # uncond + w (cond - uncond) = -1 + 3 * 3
    assert torch.equal(guided(conditional, unconditional, 3.0)(x, t), x * 8)
    assert len(asked) == 1


def test_noise_of_a_picture_is_its_seeds_alone() -> None:
    together = randn((2, 3), generators([4, 5]), CPU)
    assert torch.equal(together[1:], randn((2, 3), generators([5]), CPU))


def test_no_step_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="use at least 1"):
        timesteps(0)
