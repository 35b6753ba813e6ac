"""Generation of many images in batches, for the commands and evaluation."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import generators_from_seeds
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.control import Control


@torch.no_grad()
def generate_images(
    pipeline: TextToImage,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    settings: SamplingConfig | None = None,
    control: Control | None = None,
) -> Iterator[Tensor]:
    """Generate one image per prompt, in order.

    Args:
        pipeline: the cascade, or the baseline.
        prompts: N prompts.
        seeds: N seeds; prompt, seed and size determine an image, in any batch.
        height: height in pixels.
        width: width in pixels.
        settings: steps, guidance, sampler.
        control: what a ControlNet reads, with one image for all.

    Yields:
        (3, height, width) float32 in [0, 1].
    """
    config = settings or SamplingConfig()
    num_batches = max(1, math.ceil(len(prompts) / config.batch_size))
    size = max(1, math.ceil(len(prompts) / num_batches))
    for start in range(0, len(prompts), size):
        batch = range(start, min(start + size, len(prompts)))
        # compiled networks would be compiled again for a smaller last batch
        padding = [start] * (size - len(batch)) if pipeline.is_compiled else []
        images = pipeline.generate(
            [prompts[i] for i in (*batch, *padding)],
            height,
            width,
            config=config,
            generator=generators_from_seeds([seeds[i] for i in (*batch, *padding)]),
            control=control,
        )
        yield from images[: len(batch)].float().cpu()


@torch.no_grad()
def autoencode(pipeline: TextToImage, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> their reconstruction by Stage A, without quantization."""
    vqgan = pipeline.vqgan
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
