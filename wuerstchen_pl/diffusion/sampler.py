"""Sampling: from noise to latents with a denoiser, by DDPM or DDIM steps.

A denoiser is any callable (x_t, i) -> the noise predicted at the i-th time. With a generator for
each image, an image does not depend on the others in its batch.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule, expand_like

Denoiser = Callable[[Tensor, int], Tensor]
SamplerName = Literal["ddpm", "ddim"]
Generator = torch.Generator | list[torch.Generator] | None
"""Of all images of a batch together, of each image, or torch's own."""


def generators_from_seeds(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed: a seed means the same image on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def resolve_generator(
    seed: int | Sequence[int] | None, generator: Generator, number: int
) -> Generator:
    """``generator``, or one for each of ``number`` images.

    Raises:
        ValueError: if both are given, or too few seeds.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed and generator are both given; give one of them")
    seeds = range(seed, seed + number) if isinstance(seed, int) else list(seed)
    if len(seeds) != number:
        raise ValueError(f"{len(seeds)} seeds for {number} images; give one for each")
    return generators_from_seeds(seeds)


def randn(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """Standard normal float32 of ``shape`` (B, ...), drawn where the generator is.

    Raises:
        ValueError: if there is a list of generators, and not one for each of B.
    """
    if not isinstance(generator, list):
        drawn_on = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(tuple(shape), generator=generator, device=drawn_on).to(device)
    if len(generator) == 1:
        return randn(shape, generator[0], device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators for {shape[0]} images; give one for each, or one in all"
        )
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(device)


def ddpm_step(
    schedule: CosineSchedule, xt: Tensor, t: Tensor, t_next: Tensor, pred: Tensor, noise: Tensor
) -> Tensor:
    """Draw x at ``t_next`` < ``t`` (Ho et al. 2020, Eq. 11); no noise is added at 0.

    Args:
        schedule: the noise process.
        xt: (B, ...) at ``t``.
        t: (B,) present time.
        t_next: (B,) time after the step.
        pred: as ``xt``, predicted noise.
        noise: as ``xt``, standard normal.
    """
    now, then = expand_like(schedule.alpha_bar(t), xt), expand_like(schedule.alpha_bar(t_next), xt)
    alpha = now / then
    mean = (xt - (1 - alpha) * pred / (1 - now).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - then) / (1 - now)).sqrt()
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
        raise ValueError(f"steps={num_steps} draws nothing; use a whole number from 1 on")
    return torch.linspace(1, 0, num_steps + 1).tolist()


def check_sampler(method: str) -> None:
    """Refuse another sampler than there is.

    Raises:
        ValueError: naming those there are.
    """
    if method not in get_args(SamplerName):
        raise ValueError(f"sampler={method!r} is unknown; use 'ddpm' or 'ddim'")


def resolve_timesteps(num_steps: int, given: Sequence[float] | None) -> list[float]:
    """``given`` times if they can be sampled along, else so many equal steps."""
    return timesteps(num_steps) if given is None else check_timesteps(given)


def check_timesteps(times: Sequence[float]) -> list[float]:
    """Times that can be sampled along.

    Raises:
        ValueError: unless there are two or more, falling, within [0, 1].
    """
    found = [float(t) for t in times]
    falling = all(now > then for now, then in itertools.pairwise(found))
    if len(found) < 2 or not falling or not 0 <= found[-1] < found[0] <= 1:
        shown = f"{found[:4]}{'...' if len(found) > 4 else ''}"
        raise ValueError(f"timesteps={shown} cannot be followed; use falling ones from 1 to 0")
    return found


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
    """Follow ``denoise`` from ``x`` along ``times``.

    Args:
        denoise: the denoiser, guided or not.
        x: (B, C, h, w) latents at ``times[0]``.
        times: falling, from the start to 0.
        generator: of the noise of DDPM steps.
        schedule: the noise process.
        method: ``ddpm`` or ``ddim``.
        on_step: called after step i with i and x at ``times[i + 1]``; returns x for the next step.
        interrupted: called after each step; True stops there.

    Returns:
        (B, C, h, w) latents at ``times[-1]``.

    Raises:
        ValueError: for another method.
    """
    check_sampler(method)
    for i, (now, then) in enumerate(itertools.pairwise(times)):
        t, t_next = (torch.full((len(x),), v, device=x.device) for v in (now, then))
        pred = denoise(x, i)
        if method == "ddpm":
            x = ddpm_step(schedule, x, t, t_next, pred, randn(x.shape, generator, x.device))
        else:
            x = ddim_step(schedule, x, t, t_next, pred)
        if on_step is not None:
            x = on_step(i, x)
        if interrupted():
            break
    return x
