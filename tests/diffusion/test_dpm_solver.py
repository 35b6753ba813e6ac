"""DPM-Solver++ against closed forms on Gaussian data, and an independent formula."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.dpm_solver import DPMSolver
from wuerstchen_pl.diffusion.sampler import SamplerName, generators_from_seeds, sample, timesteps
from wuerstchen_pl.diffusion.schedule import CosineSchedule

MEAN, STD = 0.7, 0.5
START, END = 0.9, 0.1
METHODS: tuple[SamplerName, ...] = ("ddim", "dpmpp_2m")


class Exact(CosineSchedule):
    """The schedule without rounding to float32."""

    def alpha_bar(self, t: Tensor) -> Tensor:
        f = torch.cos((t.double() + self.s) / (1 + self.s) * (math.pi / 2)).square()
        start = math.cos(math.pi / 2 * self.s / (1 + self.s)) ** 2
        return (f / start).clamp(self.min_alpha_bar, self.max_alpha_bar)


SCHEDULE = Exact()


def amplitudes(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signal and noise amplitudes, and the standard deviation of x_t, for N(MEAN, STD^2) data."""
    alpha_bar = SCHEDULE.alpha_bar(t)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()


def best_prediction(xt: Tensor, t: Tensor) -> Tensor:
    """The noise that a perfect network predicts for Gaussian data."""
    alpha, sigma, std = amplitudes(t)
    return sigma * (xt - alpha * MEAN) / std**2


def flow(x: Tensor, start: float, end: float) -> Tensor:
    """The exact solution of the probability-flow ODE: x stays at the same quantile."""
    alpha, _, std = amplitudes(torch.tensor(start))
    alpha_end, _, std_end = amplitudes(torch.tensor(end))
    return alpha_end * MEAN + std_end * (x - alpha * MEAN) / std


def solved(method: SamplerName, times: Sequence[float], x: Tensor, seed: int = 0) -> Tensor:
    def denoise(xt: Tensor, i: int) -> Tensor:
        return best_prediction(xt, torch.tensor(times[i]))

    return sample(
        denoise, x, times, generators_from_seeds([seed]), schedule=SCHEDULE, method=method
    )


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_solver(method: SamplerName, order: int) -> None:
    x = torch.tensor([[-1.3], [0.2], [2.1]], dtype=torch.float64)
    exact, errors = flow(x, START, END), []
    for steps in (20, 40, 80, 160):
        times = torch.linspace(START, END, steps + 1, dtype=torch.float64).tolist()
        errors.append(float((solved(method, times, x) - exact).abs().max()))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.15)


def test_second_order_needs_far_fewer_steps() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = torch.linspace(START, END, 13, dtype=torch.float64).tolist()
    error = {
        m: (solved(m, times, x) - flow(x, START, END)).abs().max() for m in ("ddim", "dpmpp_2m")
    }
    assert error["dpmpp_2m"] < 0.2 * error["ddim"]


def test_steps_equal_an_independent_formula() -> None:
    """Algorithm 2 of the paper in float64, in its own variables."""
    times = [1.0, 0.7, 0.55, 0.2, 0.05]
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    preds = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    exact = [SCHEDULE.alpha_bar(torch.tensor(t, dtype=torch.float64)) for t in times]
    alpha = [math.sqrt(float(alpha_bar)) for alpha_bar in exact]
    sigma = [math.sqrt(1 - a * a) for a in alpha]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    expected, x0 = x, []
    for i in range(4):
        x0.append((expected - sigma[i] * preds[i]) / alpha[i])
        h = lam[i + 1] - lam[i]
        data = x0[i]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            data = (1 + 1 / (2 * r)) * x0[i] - 1 / (2 * r) * x0[i - 1]
        expected = sigma[i + 1] / sigma[i] * expected - alpha[i + 1] * (math.exp(-h) - 1) * data

    solver, actual = DPMSolver(SCHEDULE), x
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        pair = (torch.full((2,), s, dtype=torch.float64) for s in (t, t_next))
        actual = solver(actual, *pair, preds[i])
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [40, 80])
def test_the_sde_has_the_distribution_of_the_data(steps: int) -> None:
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(3)).double()
    end = solved("dpmpp_2m_sde", timesteps(steps), x)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(end.std()) == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("steps", [1, 2, 5, 300])
def test_clamped_ends_of_the_schedule_are_finite(method: SamplerName, steps: int) -> None:
    """Consecutive times near 0 and 1 have the same signal-to-noise ratio."""
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).double()
    assert solved(method, timesteps(steps), x).isfinite().all()


def test_an_image_of_the_sde_does_not_depend_on_its_batch() -> None:
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    times = timesteps(6)

    def run(rows: list[int]) -> Tensor:
        return sample(
            lambda xt, i: 0.5 * xt, x[rows], times, generators_from_seeds(rows),
            schedule=SCHEDULE, method="dpmpp_2m_sde",
        )  # fmt: skip

    assert torch.equal(run([0, 1, 2])[1:2], run([1]))
