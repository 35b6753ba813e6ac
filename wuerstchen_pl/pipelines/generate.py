"""Generation of many images in batches, for the commands and evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import (
    SamplerName,
    check_sampler,
    check_timesteps,
    generators_from_seeds,
)
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling parameters.

    Raises:
        ValueError: if a number is out of its range.
    """

    prior_steps: int = 30
    """Denoising steps of Stage C (paper: 60)."""
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
    decoder_guidance_scale: float = 0.0
    """Guidance toward the semantic latents; values up to 1 turn it off."""
    sampler: SamplerName = "ddpm"
    """``ddpm`` or ``ddim``, in both stages."""
    batch_size: int = 16
    """Images per batch; it affects speed but not the images."""

    def __post_init__(self) -> None:
        for key in ("prior_steps", "decoder_steps", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or not 1 <= value <= 10_000:
                raise ValueError(f"{key}={value!r} is out of range; use 1 to 10000")
        check_sampler(self.sampler)
        for key in ("prior_guidance_scale", "decoder_guidance_scale"):
            value = getattr(self, key)
            if not 0 <= value <= MAX_SCALE:
                raise ValueError(f"{key}={value} is out of range; use 0 to {MAX_SCALE}")
        interval: Any = tuple(self.guidance_interval)
        Guidance(rescale=self.guidance_rescale, interval=interval)
        if self.prior_timesteps is not None:
            check_timesteps(self.prior_timesteps)


MAX_SCALE = 100
"""Largest guidance scale; beyond it, images are only noise."""


@torch.no_grad()
def generate_images(
    pipeline: CascadePipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    settings: SamplingConfig | None = None,
) -> Iterator[Tensor]:
    """Generate one image per prompt, in order.

    Args:
        pipeline: the cascade.
        prompts: N prompts.
        seeds: N seeds; prompt, seed and size determine an image, in any batch.
        height: height in pixels.
        width: width in pixels.
        settings: steps, guidance, sampler.

    Yields:
        (3, height, width) float32 in [0, 1].
    """
    params = settings or SamplingConfig()
    for start in range(0, len(prompts), params.batch_size):
        batch = slice(start, start + params.batch_size)
        images = pipeline(
            prompts[batch],
            height,
            width,
            prior_num_inference_steps=params.prior_steps,
            prior_timesteps=params.prior_timesteps,
            prior_guidance_scale=params.prior_guidance_scale,
            num_inference_steps=params.decoder_steps,
            decoder_guidance_scale=params.decoder_guidance_scale,
            generator=generators_from_seeds(seeds[batch]),
            output_type="pt",
            return_dict=False,
            prior_guidance_rescale=params.guidance_rescale,
            prior_guidance_interval=(params.guidance_interval[0], params.guidance_interval[1]),
            prior_sampler=params.sampler,
            decoder_sampler=params.sampler,
            progress=False,
        )
        yield from images.float().cpu()


@torch.no_grad()
def autoencode(pipeline: CascadePipeline, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> their reconstruction by Stage A, without quantization."""
    vqgan = pipeline.decoder.vqgan
    return vqgan.decode(vqgan.encode(images.to(pipeline.placement.device))).clamp(0, 1).cpu()


def reconstruct(
    pipeline: WuerstchenPipeline, images: Tensor, num_steps: int = 12, *, seeds: Sequence[int]
) -> Tensor:
    """(B, 3, H, W) in [0, 1] and B seeds -> their reconstruction by the cascade."""
    return pipeline.reconstruct(
        images,
        seed=seeds,
        num_inference_steps=num_steps,
        output_type="pt",
        return_dict=False,
        progress=False,
    ).cpu()
