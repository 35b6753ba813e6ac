"""Sampling: from noise to latents with a denoiser, by DDPM or DDIM steps.

A denoiser is any callable (x_t, t) -> predicted noise. Every picture has a generator of its own, so
that it does not depend on the others in its batch.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule, expand

Denoiser = Callable[[Tensor, Tensor], Tensor]
Method = Literal["ddpm", "ddim"]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed: a seed means the same picture on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """(B, *shape) standard normal, row b from generator b."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows).to(device)


def guided(conditional: Denoiser, unconditional: Denoiser | None, scale: float) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho & Salimans 2022).

    A scale of 1, or no unconditional denoiser, is the conditional prediction alone.
    """
    if unconditional is None or scale == 1:
        return conditional

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(unconditional(xt, t), conditional(xt, t), scale)

    return denoise


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
    now, then = expand(schedule.alpha_bar(t), xt), expand(schedule.alpha_bar(t_next), xt)
    alpha = now / then
    mean = (xt - (1 - alpha) * pred / (1 - now).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - then) / (1 - now)).sqrt()
    return mean + std * noise * expand(t_next != 0, xt)


def ddim_step(
    schedule: CosineSchedule, xt: Tensor, t: Tensor, t_next: Tensor, pred: Tensor
) -> Tensor:
    """Deterministic step to ``t_next`` (Song et al. 2021, arXiv 2010.02502, Eq. 12, sigma 0)."""
    return schedule.add_noise(schedule.predict_x0(xt, t, pred), t_next, pred)


def timesteps(num_steps: int, start: float = 1.0) -> list[float]:
    """``num_steps`` + 1 equally spaced times from ``start`` down to 0.

    Raises:
        ValueError: unless ``num_steps`` is at least 1.
    """
    if num_steps < 1:
        raise ValueError(f"steps={num_steps} draws nothing; use at least 1")
    return torch.linspace(start, 0, num_steps + 1).tolist()


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    times: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    schedule: CosineSchedule,
    method: Method = "ddpm",
) -> Tensor:
    """Follow ``denoise`` from ``noise`` along ``times``.

    Args:
        denoise: the denoiser, guided or not.
        noise: (B, C, h, w) latents at ``times[0]``.
        times: falling, from the start to 0.
        generators: one per picture, for the noise of DDPM steps.
        schedule: the noise process.
        method: ``ddpm`` or ``ddim``.

    Returns:
        (B, C, h, w) latents at ``times[-1]``.

    Raises:
        ValueError: for another method.
    """
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"sampler={method!r} is unknown; use 'ddpm' or 'ddim'")
    x = noise
    for now, then in pairwise(times):
        t, t_next = (torch.full((len(x),), v, device=x.device) for v in (now, then))
        pred = denoise(x, t)
        if method == "ddpm":
            fresh = randn(x.shape[1:], generators, x.device)
            x = ddpm_step(schedule, x, t, t_next, pred, fresh)
        else:
            x = ddim_step(schedule, x, t, t_next, pred)
    return x
