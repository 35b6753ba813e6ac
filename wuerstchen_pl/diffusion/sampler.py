"""Sampling: from noise to latents with a denoiser, by DDPM, DDIM or DPM-Solver++ steps.

A denoiser is any callable (x_t, i) -> the noise predicted at the i-th time. With one generator per
image, an image does not depend on the others in its batch.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.dpm_solver import DPMSolver
from wuerstchen_pl.diffusion.schedule import CosineSchedule, expand_like
from wuerstchen_pl.plural import plural
from wuerstchen_pl.transfer import to_device

Denoiser = Callable[[Tensor, int], Tensor]
SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"]
"""The last two are DPM-Solver++, as an ODE and as an SDE."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, t_next, predicted noise) -> x at t_next."""
Generator = torch.Generator | list[torch.Generator] | None
"""One for the whole batch, one per image, or None for torch's default."""


def generators_from_seeds(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed, so that a seed gives the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def resolve_generator(
    seed: int | Sequence[int] | None, generator: Generator, num_images: int
) -> Generator:
    """``generator``, or one generator per image if ``seed`` is given.

    Raises:
        ValueError: if both are given, or the number of seeds is not ``num_images``.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed and generator are both given; use one of them")
    seeds = range(seed, seed + num_images) if isinstance(seed, int) else list(seed)
    if len(seeds) != num_images:
        raise ValueError(
            f"{plural(len(seeds), 'seed')} for {plural(num_images, 'image')}; give one per image"
        )
    return generators_from_seeds(seeds)


def randn(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Standard normal float32 noise of ``shape`` (B, ...), sampled on the generator's device.

    Raises:
        ValueError: if a list of generators has neither 1 nor B entries.
    """
    return _random(shape, generator, device, Tensor.normal_)


def rand(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Uniform float32 numbers in [0, 1) of ``shape`` (B, ...), as ``randn``."""
    return _random(shape, generator, device, Tensor.uniform_)


def _random(
    shape: Sequence[int],
    generator: Generator,
    device: torch.device,
    fill: Callable[..., Tensor],
) -> Tensor:
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, shape[0]):
        raise ValueError(
            f"{plural(len(generators), 'generator')} for {plural(shape[0], 'image')}; "
            "give one per image, or one for all"
        )
    source = torch.device("cpu") if generators[0] is None else generators[0].device
    pin = (source.type, device.type) == ("cpu", "cuda")
    numbers = torch.empty(tuple(shape), device=source, pin_memory=pin)
    for rows, g in zip(numbers.chunk(len(generators)), generators, strict=True):
        fill(rows, generator=g)
    return to_device(numbers, device)


def ddpm_step(
    schedule: CosineSchedule, xt: Tensor, t: Tensor, t_next: Tensor, pred: Tensor, noise: Tensor
) -> Tensor:
    """Sample x at ``t_next`` < ``t`` (Ho et al. 2020, Eq. 11); no noise is added at time 0.

    Args:
        schedule: the noise process.
        xt: (B, ...) at ``t``.
        t: (B,) current time.
        t_next: (B,) time after the step.
        pred: predicted noise, of the shape of ``xt``.
        noise: standard normal, of the shape of ``xt``.
    """
    alpha_bar = expand_like(schedule.alpha_bar(t), xt)
    alpha_bar_next = expand_like(schedule.alpha_bar(t_next), xt)
    alpha = alpha_bar / alpha_bar_next
    mean = (xt - (1 - alpha) * pred / (1 - alpha_bar).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    return mean + std * noise * expand_like(t_next != 0, xt)


def ddim_step(
    schedule: CosineSchedule, xt: Tensor, t: Tensor, t_next: Tensor, pred: Tensor
) -> Tensor:
    """Deterministic step to ``t_next`` (Song et al. 2021, arXiv 2010.02502, Eq. 12, sigma 0)."""
    return schedule.add_noise(schedule.predict_x0(xt, t, pred), t_next, pred)


def timesteps(num_steps: int) -> list[float]:
    """``num_steps`` + 1 equally spaced times from 1 down to 0.

    Raises:
        ValueError: unless ``num_steps`` is at least 1.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"steps={num_steps} is not a positive integer; use 1 or more")
    return torch.linspace(1, 0, num_steps + 1).tolist()


def check_sampler(method: str) -> None:
    """Reject unknown samplers.

    Raises:
        ValueError: if ``method`` is not a ``SamplerName``.
    """
    if method not in get_args(SamplerName):
        choices = ", ".join(get_args(SamplerName))
        raise ValueError(f"sampler={method!r} is unknown; choose from {choices}")


def make_step(method: SamplerName, schedule: CosineSchedule, generator: Generator) -> Step:
    """The step of a sampler for one run; DPM-Solver++ remembers the step before.

    Args:
        method: name of the sampler.
        schedule: the noise process.
        generator: for the noise of ``ddpm`` and ``dpmpp_2m_sde``.

    Raises:
        ValueError: if ``method`` is unknown.
    """
    check_sampler(method)

    def noise(x: Tensor) -> Tensor:
        return randn(x.shape, generator, x.device)

    def ddpm(x: Tensor, t: Tensor, t_next: Tensor, pred: Tensor) -> Tensor:
        return ddpm_step(schedule, x, t, t_next, pred, noise(x))

    match method:
        case "ddpm":
            return ddpm
        case "ddim":
            return partial(ddim_step, schedule)
        case "dpmpp_2m":
            return DPMSolver(schedule)
        case "dpmpp_2m_sde":
            return DPMSolver(schedule, noise)


def resolve_timesteps(num_steps: int, times: Sequence[float] | None) -> list[float]:
    """Checked ``times``, or those of ``num_steps`` equal steps if None."""
    return timesteps(num_steps) if times is None else check_timesteps(times)


def check_timesteps(times: Sequence[float], argument: str = "timesteps") -> list[float]:
    """``times`` as floats if a sampler can follow them; an error names ``argument``.

    Raises:
        ValueError: unless there are two or more, decreasing, in [0, 1].
    """
    values = [float(t) for t in times]
    decreasing = all(t > t_next for t, t_next in itertools.pairwise(values))
    if len(values) < 2 or not decreasing or not 0 <= values[-1] < values[0] <= 1:
        shown = f"{values[:4]}{'...' if len(values) > 4 else ''}"
        raise ValueError(f"{argument}={shown} are not decreasing in [0, 1]; use e.g. [1, 0.5, 0]")
    return values


@torch.no_grad()
def sample(
    denoise: Denoiser,
    x: Tensor,
    times: Sequence[float],
    generator: Generator,
    *,
    schedule: CosineSchedule,
    method: SamplerName = "ddpm",
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Denoise ``x`` along ``times``.

    Args:
        denoise: the denoiser, guided or not.
        x: (B, C, h, w) latents at ``times[0]``.
        times: decreasing times in [0, 1], usually to 0.
        generator: for the noise of random steps.
        schedule: the noise process.
        method: name of the sampler.
        on_step: called after step i with i and x at ``times[i + 1]``; returns x for the next step.
        interrupted: called after each step; True stops the loop.

    Returns:
        (B, C, h, w) latents at ``times[-1]``.

    Raises:
        ValueError: if ``method`` is unknown.
    """
    step = make_step(method, schedule, generator)
    for i, pair in enumerate(itertools.pairwise(times)):
        t, t_next = (torch.full((len(x),), value, device=x.device) for value in pair)
        x = step(x, t, t_next, denoise(x, i))
        if on_step is not None:
            x = on_step(i, x)
        if interrupted():
            break
    return x
