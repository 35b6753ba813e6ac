"""Many pictures, batch by batch: what the commands and evaluation share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import Method, check_method, check_times, generators
from wuerstchen_pl.pipeline.cascade import Cascade
from wuerstchen_pl.pipeline.wuerstchen import WuerstchenPipeline


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are drawn.

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
    sampler: Method = "ddpm"
    """``ddpm`` or ``ddim``, in both stages."""
    batch_size: int = 16
    """Pictures drawn at once; it changes the speed and no picture."""

    def __post_init__(self) -> None:
        for key in ("prior_steps", "decoder_steps", "batch_size"):
            value = getattr(self, key)
            if not isinstance(value, int) or not 1 <= value <= 10_000:
                raise ValueError(f"{key}={value!r} is out of range; use 1 to 10000")
        check_method(self.sampler)
        for key in ("prior_guidance_scale", "decoder_guidance_scale"):
            value = getattr(self, key)
            if not 0 <= value <= MAX_SCALE:
                raise ValueError(f"{key}={value} is out of range; use 0 to {MAX_SCALE}")
        interval: Any = tuple(self.guidance_interval)
        Guidance(rescale=self.guidance_rescale, interval=interval)
        if self.prior_timesteps is not None:
            check_times(self.prior_timesteps)


MAX_SCALE = 100
"""Of guidance: beyond it, nothing but noise is to be seen."""


@torch.no_grad()
def draw(
    pipeline: Cascade,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    settings: Settings | None = None,
) -> Iterator[Tensor]:
    """Draw one picture for each prompt, in order.

    Args:
        pipeline: the cascade.
        prompts: N of them.
        seeds: N; a prompt, a seed and a size give the same picture whatever the batch.
        height: in pixels.
        width: likewise.
        settings: steps, guidance, sampler.

    Yields:
        (3, height, width) float32 in [0, 1].
    """
    how = settings or Settings()
    for start in range(0, len(prompts), how.batch_size):
        part = slice(start, start + how.batch_size)
        images = pipeline(
            prompts[part],
            height,
            width,
            prior_num_inference_steps=how.prior_steps,
            prior_timesteps=how.prior_timesteps,
            prior_guidance_scale=how.prior_guidance_scale,
            num_inference_steps=how.decoder_steps,
            decoder_guidance_scale=how.decoder_guidance_scale,
            generator=generators(seeds[part]),
            output_type="pt",
            return_dict=False,
            prior_guidance_rescale=how.guidance_rescale,
            prior_guidance_interval=(how.guidance_interval[0], how.guidance_interval[1]),
            prior_sampler=how.sampler,
            decoder_sampler=how.sampler,
            progress=False,
        )
        yield from images.float().cpu()


@torch.no_grad()
def autoencoded(pipeline: Cascade, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same through Stage A, unquantized as Stage B's latents are."""
    vqgan = pipeline.decoder.vqgan
    return vqgan.decode(vqgan.encode(images.to(pipeline.place.device))).clamp(0, 1).cpu()


def reconstructed(
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
