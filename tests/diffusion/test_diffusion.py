"""The noise process, objective, guidance and samplers against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.latent_scaling import LatentScaling
from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
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
from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps

SCHEDULE = CosineSchedule()
CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("form", "weight"),
    [("code", lambda a: 1 - a), ("paper", lambda a: (1 - a) / (1 + a)), ("none", lambda a: 1.0)],
)
def test_p2_weight_has_its_closed_form(form: str, weight: object) -> None:
    t = torch.tensor([0.1, 0.4, 0.9])
    expected = torch.tensor(
        [weight(a) for a in SCHEDULE.alpha_bar(t).tolist()]  # type: ignore[operator]
    )
    torch.testing.assert_close(p2_weight(SCHEDULE, t, form), expected)  # type: ignore[arg-type]
    alpha_bar = SCHEDULE.alpha_bar(t)
    snr = alpha_bar / (1 - alpha_bar)
    if form == "code":  # k = gamma = 1 of Choi et al.
        torch.testing.assert_close(p2_weight(SCHEDULE, t, "code"), 1 / (1 + snr))


def test_an_unknown_form_of_the_weight_is_rejected() -> None:
    with pytest.raises(ValueError, match="'paper', 'code' or 'none'"):
        p2_weight(SCHEDULE, torch.tensor([0.5]), "p3")  # type: ignore[arg-type]


def test_noise_error_is_the_mean_of_each_sample() -> None:
    pred = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, 2.0]]])
    expected = torch.tensor([21.0, 1.0])
    torch.testing.assert_close(noise_error(pred, torch.zeros(2, 2, 2)), expected)


def test_noise_error_is_computed_in_float32() -> None:
    pred, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = noise_error(pred.float(), noise.float())
    for a, b in ((pred, noise), (pred.float(), noise), (pred, noise.float())):
        assert torch.equal(noise_error(a, b), expected)


def test_scaled_latents_are_shifted_before_they_are_divided() -> None:
    semantic = torch.tensor([-1.0, 0.0, 41.0])
    scaling = LatentScaling(shift=1.0, scale=42.0)
    torch.testing.assert_close(scaling.normalize(semantic), torch.tensor([0.0, 1 / 42, 1.0]))
    torch.testing.assert_close(scaling.denormalize(scaling.normalize(semantic)), semantic)
    plain = LatentScaling()
    assert torch.equal(plain.normalize(semantic), semantic)
    assert torch.equal(plain.denormalize(semantic), semantic)


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


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
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


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_prediction() -> None:
    conditional, unconditional = torch.full((1, 2), 2.0), torch.full((1, 2), -1.0)
    guided = Guidance(scale=3.0).combine(conditional, unconditional)
    assert torch.equal(guided, torch.full((1, 2), 8.0))  # -1 + 3 * 3


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0])
def test_guidance_scales_up_to_one_turn_it_off(scale: float) -> None:
    assert not Guidance(scale=scale).on
    assert Guidance(scale=1.001).on


def test_guidance_is_off_by_default_and_else_plain_at_all_times() -> None:
    assert not Guidance().on
    assert Guidance(scale=2.0) == Guidance(scale=2.0, rescale=0.0, interval=(0.0, 1.0))
    assert all(Guidance(scale=2.0).at(t) for t in (0.0, 1.0))


def test_guidance_is_limited_to_its_interval() -> None:
    guidance = Guidance(scale=4.0, interval=(0.2, 0.8))
    assert [guidance.at(t) for t in (0.1, 0.2, 0.5, 0.8, 0.9)] == [False, True, True, True, False]
    assert not Guidance(scale=1.0, interval=(0.2, 0.8)).at(0.5)


def test_rescaled_guidance_has_the_conditional_predictions_standard_deviation() -> None:
    conditional, unconditional = torch.randn(
        2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    axes = (1, 2, 3)
    plain = Guidance(scale=7.0).combine(conditional, unconditional)
    full = Guidance(scale=7.0, rescale=1.0).combine(conditional, unconditional)
    half = Guidance(scale=7.0, rescale=0.5).combine(conditional, unconditional)
    torch.testing.assert_close(full.std(axes), conditional.std(axes))
    torch.testing.assert_close(half, (plain + full) / 2)
    assert (plain.std(axes) > 3 * conditional.std(axes)).all()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"scale": float("nan")}, "guidance_scale=nan is not finite"),
        ({"interval": (0.5,)}, "is not an interval"),
        ({"interval": (0.1, 0.5, 0.9)}, "is not an interval"),
        ({"rescale": 1.001}, "guidance_rescale=1.001 is out of range"),
        ({"rescale": -0.001}, "guidance_rescale=-0.001 is out of range"),
        ({"interval": (0.5, 0.5)}, "is empty"),
        ({"interval": (0.7, 0.3)}, "is empty"),
        ({"interval": (0.5, 1.001)}, "is empty"),
        ({"interval": (-0.001, 0.5)}, "is empty"),
    ],
)
def test_guidance_out_of_range_is_rejected(argument: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**argument)


def test_guidance_is_plain_by_default() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(scale=2.0)
    assert all(guidance.at(t) for t in (0.0, 0.5, 1.0))
    expected = 2 * conditional - unconditional
    torch.testing.assert_close(guidance.combine(conditional, unconditional), expected)
    assert not Guidance().on
    assert Guidance(scale=1.001, rescale=1.0).on


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


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
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
