"""DDPM and DDIM steps, generators and time grids against their closed forms."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import (
    SamplerName,
    check_timesteps,
    ddpm_step,
    generators_from_seeds,
    randn,
    resolve_generator,
    resolve_timesteps,
    sample,
    timesteps,
)
from wuerstchen_pl.diffusion.schedule import CosineSchedule

SCHEDULE = CosineSchedule()


CPU = torch.device("cpu")


def test_a_ddpm_step_samples_the_posterior_of_the_true_noise() -> None:
    """Its mean and variance are those of q(x_s | x_t, x_0) (Ho et al. 2020, Eq. 7)."""
    x0, noise, fresh = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    t, s = torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.1, 0.5, 0.75])
    xt = SCHEDULE.add_noise(x0, t, noise)
    a_t, a_s = (SCHEDULE.alpha_bar(time).double()[:, None] for time in (t, s))
    alpha = a_t / a_s
    mean = a_s.sqrt() * (1 - alpha) / (1 - a_t) * x0 + alpha.sqrt() * (1 - a_s) / (1 - a_t) * xt
    std = ((1 - alpha) * (1 - a_s) / (1 - a_t)).sqrt()
    stepped = ddpm_step(SCHEDULE, xt, t, s, noise, fresh)
    torch.testing.assert_close(stepped, mean + std * fresh, atol=1e-4, rtol=1e-4)


def test_a_ddpm_step_adds_no_noise_at_time_zero_only() -> None:
    xt, pred = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([0.01, 0.01]), torch.tensor([0.0, 0.001])
    quiet, noisy = (
        ddpm_step(SCHEDULE, xt, t, t_next, pred, torch.full((2, 4), size)) for size in (0.0, 1e3)
    )
    assert torch.equal(quiet[0], noisy[0])
    assert (quiet[1] != noisy[1]).all()


@pytest.mark.parametrize("method", get_args(SamplerName))
def test_a_perfect_denoiser_recovers_the_data(method: str) -> None:
    x0 = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    rngs = generators_from_seeds([1, 2, 3])

    times = timesteps(10)

    def denoise(xt: Tensor, i: int) -> Tensor:  # the noise that turns x0 into xt
        alpha_bar = SCHEDULE.alpha_bar(torch.tensor(times[i]))
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    noise = randn(x0.shape, rngs, CPU)
    out = sample(denoise, noise, times, rngs, schedule=SCHEDULE, method=method)
    # the clamped end of the schedule leaves noise of std 0.01
    torch.testing.assert_close(out, x0, atol=5e-2, rtol=0)


def test_ddpm_keeps_the_variance_of_standard_normal_data() -> None:
    # For x0 ~ N(0, 1), the optimal noise prediction is sqrt(1 - alpha_bar) x_t.
    rngs = generators_from_seeds(range(4))

    times = timesteps(200)

    def denoise(xt: Tensor, i: int) -> Tensor:
        return (1 - SCHEDULE.alpha_bar(torch.tensor(times[i]))).sqrt() * xt

    noise = randn((4, 8, 32, 32), rngs, CPU)
    out = sample(denoise, noise, times, rngs, schedule=SCHEDULE)
    assert float(out.std()) == pytest.approx(1, abs=0.03)


def test_the_noise_of_an_image_depends_on_its_seed_only() -> None:
    together = randn((2, 2, 3), generators_from_seeds([4, 5]), CPU)
    assert torch.equal(together[1:], randn((1, 2, 3), generators_from_seeds([5]), CPU))


def test_one_generator_makes_the_noise_of_the_whole_batch() -> None:
    rng = torch.Generator().manual_seed(4)
    expected = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(randn((2, 2, 3), rng, CPU), expected)


@pytest.mark.parametrize("seeds", [[4], [4, 5]])
def test_noise_is_moved_to_the_device_of_the_latents(seeds: list[int]) -> None:
    assert randn((2, 3), generators_from_seeds(seeds), torch.device("meta")).device.type == "meta"


def test_without_a_generator_noise_is_of_torchs_default_one() -> None:
    torch.manual_seed(4)
    noise = randn((2, 3), None, CPU)
    torch.manual_seed(4)
    assert torch.equal(noise, torch.randn(2, 3))
    assert resolve_generator(None, None, 2) is None


def test_a_wrong_number_of_generators_or_seeds_is_rejected() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        randn((3, 2), generators_from_seeds([1, 2]), CPU)
    from_list, from_one = (
        randn((3, 2), g, CPU) for g in (generators_from_seeds([1]), generators_from_seeds([1])[0])
    )
    assert torch.equal(from_list, from_one)
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        resolve_generator([1, 2], None, 3)
    with pytest.raises(ValueError, match="seed and generator are both given"):
        resolve_generator(1, generators_from_seeds([1]), 1)


def test_a_given_generator_is_used_as_it_is() -> None:
    rng = torch.Generator()
    assert resolve_generator(None, rng, 3) is rng


def test_a_seed_per_image_is_that_of_its_image() -> None:
    rngs = resolve_generator([7, 3], None, 2)
    assert isinstance(rngs, list)
    assert [rng.initial_seed() for rng in rngs] == [7, 3]


def test_a_single_seed_is_that_of_the_first_image() -> None:
    first, second = (rng.initial_seed() for rng in resolve_generator(7, None, 2) or [])
    assert (first, second) == (7, 8)


@pytest.mark.parametrize(
    "times",
    [[], [1.0], [0.5, 0.5], [0.2, 0.4], [1.0, 0.5, 0.5, 0.0], [1.001, 0.0], [1.0, 0.5, -0.001]],
)
def test_times_that_do_not_decrease_in_0_to_1_are_rejected(times: list[float]) -> None:
    with pytest.raises(ValueError, match="are not decreasing in"):
        check_timesteps(times)


@pytest.mark.parametrize("times", [[1, 0], [0.5, 0.25], [1.0, 0.7, 0.1, 0.0]])
def test_decreasing_times_are_kept_as_floats(times: list[float]) -> None:
    kept = resolve_timesteps(3, times)
    assert kept == times
    assert all(isinstance(t, float) for t in kept)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_equal_and_end_at_zero(steps: int) -> None:
    expected = [1 - i / steps for i in range(steps + 1)]
    assert resolve_timesteps(steps, None) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 2.0])
def test_numbers_of_steps_that_are_not_positive_integers_are_rejected(steps: float) -> None:
    with pytest.raises(ValueError, match=f"steps={steps} is not a positive integer"):
        timesteps(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ddpm", "ddim"])  # the others remember a step
def test_a_run_in_two_parts_equals_one_run(method: SamplerName) -> None:
    """The first part ends at the time at which the second begins, or is interrupted there."""
    times, x = timesteps(6), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor, rngs: list[torch.Generator], first: int, last: int = 6, **options) -> Tensor:
        return sample(
            lambda x, i: x.sin() + (first + i), x, times[first : last + 1], rngs,
            schedule=SCHEDULE, method=method, **options,
        )  # fmt: skip

    whole = run(x, generators_from_seeds([1, 2]), 0)
    for first_part in ({"last": 2}, {"interrupted": iter([False, True]).__next__}):
        rngs = generators_from_seeds([1, 2])
        assert torch.equal(run(run(x, rngs, 0, **first_part), rngs, 2), whole)


def test_the_default_sampler_takes_ddpm_steps_with_the_generators_noise() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    out = sample(lambda x, i: x.sin(), x, [0.8, 0.5], generators_from_seeds([1, 2]),
                 schedule=SCHEDULE)  # fmt: skip
    t, t_next = torch.full((2,), 0.8), torch.full((2,), 0.5)
    noise = randn(x.shape, generators_from_seeds([1, 2]), CPU)
    assert torch.equal(out, ddpm_step(SCHEDULE, x, t, t_next, x.sin(), noise))


def test_ddim_steps_keep_the_data_and_the_noise_that_they_predict() -> None:
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    start, end = (SCHEDULE.add_noise(x0, torch.full((3,), t), noise) for t in (0.8, 0.3))
    out = sample(lambda x, i: noise, start, [0.8, 0.5, 0.3], None, schedule=SCHEDULE, method="ddim")
    torch.testing.assert_close(out, end, atol=1e-5, rtol=1e-5)


def test_the_next_step_uses_what_the_callback_returns() -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, i: int) -> Tensor:
        seen.append(x)
        return x

    x = torch.ones(1, 2)
    out = sample(
        denoise, x, timesteps(3), None, schedule=SCHEDULE, method="ddim",
        on_step=lambda i, _: torch.full((1, 2), float(i)),
    )  # fmt: skip
    assert [float(value[0, 0]) for value in seen] == [1.0, 0.0, 1.0]
    assert torch.equal(out, torch.full((1, 2), 2.0))


def test_a_sampler_without_that_name_is_rejected() -> None:
    with pytest.raises(ValueError, match="sampler='euler' is unknown"):
        sample(
            lambda x, i: x, torch.ones(1), [1, 0], None, schedule=SCHEDULE,
            method="euler",  # type: ignore[arg-type]
        )  # fmt: skip
