"""Settings of a sampling run, from the YAML to the denoising loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import (
    SamplerName,
    check_sampler,
    check_timesteps,
    timesteps,
)


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """Settings of one stage's denoising loop.

    Raises:
        ValueError: if the method is unknown.
    """

    times: Sequence[float]
    """Decreasing, from the start to 0."""
    guidance: Guidance
    method: SamplerName = "ddpm"
    temperature: tuple[float, float] | None = None
    """At the first and at the last step, of version 1's Stage B; None is its default."""

    def __post_init__(self) -> None:
        check_sampler(self.method)
        if self.temperature is not None and not (
            len(self.temperature) == 2 and min(self.temperature) > 0
        ):
            raise ValueError(
                f"temperature={self.temperature} is invalid; use two positive numbers, such as "
                "[1.0, 0.6]"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling parameters.

    Raises:
        ValueError: if a number is out of its range.
    """

    prior_steps: int = 30
    """Denoising steps of Stage C (paper: 60)."""
    prior_sampler: SamplerName = "ddpm"
    """``ddpm``, ``ddim``, ``dpmpp_2m`` or ``dpmpp_2m_sde``."""
    prior_timesteps: Sequence[float] | None = None
    """Decreasing times of Stage C in [0, 1] instead of equal steps."""
    prior_guidance_scale: float = 4.0
    """Guidance away from the empty caption; values up to 1 turn it off."""
    guidance_rescale: float = 0.0
    """``rescale`` of Stage C's ``Guidance``, in [0, 1]."""
    guidance_interval: Sequence[float] = (0.0, 1.0)
    """Times of Stage C, [lowest, highest], at which to guide."""
    decoder_steps: int = 12
    """Denoising steps of Stage B (paper: 12)."""
    decoder_sampler: SamplerName = "ddpm"
    """See ``prior_sampler``; version 1's Stage B has one of its own."""
    decoder_guidance_scale: float = 0.0
    """Guidance toward the semantic latents; values up to 1 turn it off."""
    decoder_temperature: Sequence[float] | None = None
    """Of version 1's Stage B at the first and at the last step; None is (1, 0.6)."""
    batch_size: int = 16
    """Images per batch; it affects speed but not the images."""

    def __post_init__(self) -> None:
        for key in ("prior_steps", "decoder_steps", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or not 1 <= value <= 10_000:
                raise ValueError(f"{key}={value!r} is out of range; use 1 to 10000")
        for key in ("prior_guidance_scale", "decoder_guidance_scale"):
            value = getattr(self, key)
            if not 0 <= value <= MAX_SCALE:
                raise ValueError(f"{key}={value} is out of range; use 0 to {MAX_SCALE}")
        _ = self.prior, self.decoder  # which check the sampler, the times and the guidance

    @cached_property
    def prior(self) -> DenoiseConfig:
        """Denoising of Stage C."""
        times = timesteps(self.prior_steps)
        if self.prior_timesteps is not None:
            times = check_timesteps(self.prior_timesteps, "prior_timesteps")
        interval: Any = tuple(self.guidance_interval)
        return DenoiseConfig(
            times=times,
            guidance=Guidance(
                scale=self.prior_guidance_scale,
                rescale=self.guidance_rescale,
                interval=interval,
            ),
            method=self.prior_sampler,
        )

    @cached_property
    def decoder(self) -> DenoiseConfig:
        """Denoising of Stage B."""
        temperature: Any = self.decoder_temperature and tuple(self.decoder_temperature)
        return DenoiseConfig(
            times=timesteps(self.decoder_steps),
            guidance=Guidance(scale=self.decoder_guidance_scale),
            method=self.decoder_sampler,
            temperature=temperature,
        )


MAX_SCALE = 100
"""Largest guidance scale; beyond it, images are only noise."""
