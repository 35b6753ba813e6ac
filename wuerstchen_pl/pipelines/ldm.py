"""Text to images with the paper's baseline: one latent diffusion model and Stage A."""

from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import Generator
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.loop import DenoiseParams
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.prompts import Prompts


class LatentDiffusionPipeline(TextToImage):
    """The paper's baseline: text to Stage A's latents, and Stage A.

    Args:
        prior: text to Stage A's latents.
        vqgan: Stage A.
        source: path and hash of the checkpoint that the networks were loaded from.
        image_size: see ``TextToImage``.
    """

    def __init__(
        self,
        *,
        prior: PriorSampler,
        vqgan: VQGAN,
        source: Source | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(
            prior=prior,
            vqgan=vqgan,
            placement=prior.placement,
            source=source,
            image_size=image_size,
        )

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The networks in the order of their use."""
        return [self.prior.text_encoder, self.prior.prior, self.vqgan]

    def _compile(self, **options: Any) -> None:
        self.prior.compile(**options)

    def _generate(
        self, prompts: Prompts, size: tuple[int, int], config: SamplingConfig,
        generator: Generator, control: Control | None,
    ) -> Tensor:  # fmt: skip
        params = DenoiseParams(config=config.prior, generator=generator)
        latents = self.prior.sample(prompts, *size, params, control=control)
        with self.placement.on_device(self.vqgan):
            return self.vqgan.decode(latents).clamp(0, 1)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that heights and widths are multiples of."""
        return self.vqgan.factor * self.prior.prior.size_multiple
