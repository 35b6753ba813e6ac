"""Version 2's Stage B: semantic latents to Stage A's latents by diffusion."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.conditioning import BlockInputs, CachedConditioning
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.initial_latents import initial_noise
from wuerstchen_pl.sampling.loop import TEXT, DenoiseParams, continuous_solver, denoise


class LatentDecoderSampler(DecoderSampler):
    """Denoises Stage A's unquantized latents; for its arguments, see ``DecoderSampler``."""

    decoder: DiffNeXt

    def __init__(self, *, decoder: DiffNeXt, **options: Any) -> None:
        super().__init__(decoder=decoder, **options)
        self.schedule = CosineSchedule()
        self.predict = decoder.predict_noise

    def check(self, params: DenoiseParams) -> None:
        """See ``DecoderSampler``; refuse a temperature."""
        super().check(params)
        if params.config.temperature is not None:
            raise ValueError(
                f"decoder_temperature={params.config.temperature} is for version 1's Stage B, "
                "which samples tokens; set it to null"
            )

    def _generate(
        self,
        grid: tuple[int, int],
        tensors: dict[str, Tensor],
        params: DenoiseParams,
        latents: Tensor | None,
    ) -> Tensor:
        semantic = tensors["image_embeddings"]
        shape = (len(semantic), self.decoder.latent_channels, *grid)
        noise = initial_noise(shape, latents, params.generator, semantic.device)
        steps = torch.tensor(params.config.times[:-1], device=noise.device)
        # cached conditioning takes 0.5 GB per image at 1024 px in bfloat16
        prepare = self.decoder.inputs if self.placement.offload else self.decoder.cache_conditioning

        def cache_conditioning(
            tensors: Mapping[str, Tensor],
        ) -> list[CachedConditioning] | list[BlockInputs]:
            return prepare(steps, self.guided_semantic(tensors, params), tensors.get(TEXT), grid)

        with self.placement.on_device(self.decoder):
            return denoise(
                self.predict,
                cache_conditioning,
                noise,
                tensors,
                params,
                sampler=self,
                solver=continuous_solver(params, self.schedule),
            )
