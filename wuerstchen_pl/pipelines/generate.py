"""Many images, batch by batch: what the commands and evaluation share."""

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
    """How images are drawn.

    Raises:
        ValueError: if a number is out of its range.
    """

    prior_steps: int = 30
    """Denoising steps of Stage C (paper: 60)."""
    prior_timesteps: Sequence[float] | None = None
    """Falling times of Stage C in [0, 1] instead of equal steps."""
    prior_guidance_scale: float = 4.0
    """Away from the empty caption; up to 1 is none."""
    guidance_rescale: float = 0.0
    """Share of the conditional prediction's standard deviation to go back to, in Stage C."""
    guidance_interval: Sequence[float] = (0.0, 1.0)
    """Times of Stage C, [least, greatest], in which to guide."""
    decoder_steps: int = 12
    """Denoising steps of Stage B (paper: 12)."""
    decoder_guidance_scale: float = 0.0
    """Towards the semantic latents; up to 1 is none."""
    sampler: SamplerName = "ddpm"
    """``ddpm`` or ``ddim``, in both stages."""
    batch_size: int = 16
    """Images drawn at once; it changes the speed and no image."""

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
"""Of guidance: beyond it, nothing but noise is to be seen."""


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
    """Draw one image for each prompt, in order.

    Args:
        pipeline: the cascade.
        prompts: N of them.
        seeds: N; a prompt, a seed and a size give the same image whatever the batch.
        height: in pixels.
        width: likewise.
        settings: steps, guidance, sampler.

    Yields:
        (3, height, width) float32 in [0, 1].
    """
    params = settings or SamplingConfig()
    for start in range(0, len(prompts), params.batch_size):
        part = slice(start, start + params.batch_size)
        images = pipeline(
            prompts[part],
            height,
            width,
            prior_num_inference_steps=params.prior_steps,
            prior_timesteps=params.prior_timesteps,
            prior_guidance_scale=params.prior_guidance_scale,
            num_inference_steps=params.decoder_steps,
            decoder_guidance_scale=params.decoder_guidance_scale,
            generator=generators_from_seeds(seeds[part]),
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
    """(B, 3, H, W) in [0, 1] -> the same through Stage A, unquantized as Stage B's latents are."""
    vqgan = pipeline.decoder.vqgan
    return vqgan.decode(vqgan.encode(images.to(pipeline.placement.device))).clamp(0, 1).cpu()


def reconstruct(
    pipeline: WuerstchenPipeline, images: Tensor, num_steps: int = 12, *, seeds: Sequence[int]
) -> Tensor:
    """(B, 3, H, W) in [0, 1] and B seeds -> the same through compressor, Stage B and A."""
    return pipeline.reconstruct(
        images,
        seed=seeds,
        num_inference_steps=num_steps,
        output_type="pt",
        return_dict=False,
        progress=False,
    ).cpu()
