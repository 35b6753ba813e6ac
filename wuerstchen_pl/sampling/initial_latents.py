"""What sampling starts from: noise, or latents noised to an intermediate time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import Generator, randn
from wuerstchen_pl.diffusion.schedule import CosineSchedule


class InitLatents(NamedTuple):
    """Initial latents in Stage C's scale, and the region to regenerate."""

    latents: Tensor  # (B, S, h, w)
    mask: Tensor | None  # (B, 1, h, w), 1 where to generate; None for everywhere


def initial_noise(
    shape: tuple[int, ...], latents: Tensor | None, generator: Generator, device: torch.device
) -> Tensor:
    """Initial noise: ``latents`` if given, else random.

    Raises:
        ValueError: if ``latents`` have another shape.
    """
    if latents is None:
        return randn(shape, generator, device)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; use shape {shape}")
    return latents.to(device, torch.float32)


def expand_rows(x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Repeat the rows of ``x`` (one for all, per prompt or per image) to ``shape``.

    Raises:
        ValueError: if their number or shape does not fit.
    """
    if x.shape[1:] != shape[1:] or not len(x) or shape[0] % len(x):
        raise ValueError(f"{name} have shape {tuple(x.shape)}; use shape {shape}, or one row")
    return x.repeat_interleave(shape[0] // len(x), dim=0)


def times_from(strength: float, times: Sequence[float]) -> Sequence[float]:
    """The times to sample at, from ``strength`` down.

    Raises:
        ValueError: if ``strength`` is outside [0, 1], or not above the last time.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} is out of range; use 0 to 1")
    if 0 < strength <= times[-1]:
        raise ValueError(f"strength={strength} is too low; use 0, or more than {times[-1]}")
    if strength >= times[0]:
        return times
    return [strength, *(t for t in times if t < strength)]


def noised(schedule: CosineSchedule, latents: Tensor, t: float, noise: Tensor) -> Tensor:
    """Latents at time ``t``; exactly themselves at 0, where the schedule leaves a little noise."""
    if t == 0:
        return latents
    return schedule.add_noise(latents, torch.full((len(latents),), t, device=latents.device), noise)
