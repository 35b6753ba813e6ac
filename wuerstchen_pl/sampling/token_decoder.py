"""Version 1's Stage B: semantic latents to Stage A's tokens by discrete diffusion."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import rand
from wuerstchen_pl.diffusion.tokens import draw_tokens, random_tokens, sample_tokens
from wuerstchen_pl.models.conditioning import BlockInputs, tile_batch
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.loop import TEXT, Conditioning, DenoiseParams, denoise

TEMPERATURE = (1.0, 0.6)
"""At the first and at the last step, as in the released notebooks."""


class TokenDecoderSampler(DecoderSampler):
    """Samples Stage A's tokens; for its arguments, see ``DecoderSampler``."""

    decoder: Paella

    def __init__(self, *, decoder: Paella, **options: Any) -> None:
        super().__init__(decoder=decoder, **options)
        self.predict = self._classify

    def _classify(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, H, W) tokens and the conditioning of B or 2B rows -> logits of as many rows."""
        (inputs,) = conditioning
        assert isinstance(inputs, BlockInputs)
        assert inputs.cond is not None
        tokens = tile_batch(tokens, inputs.cond)
        return self.decoder.predict_logits(tokens, inputs.time.expand(len(tokens)), inputs.cond)

    def _generate(
        self,
        grid: tuple[int, int],
        tensors: dict[str, Tensor],
        params: DenoiseParams,
        latents: Tensor | None,
    ) -> Tensor:
        semantic = tensors["image_embeddings"]
        uniform = partial(rand, (len(semantic), *grid), params.generator, semantic.device)
        tokens = self._initial_tokens(latents, uniform())
        first, last = params.config.temperature or TEMPERATURE
        steps = torch.tensor(params.config.times[:-1], device=semantic.device)
        temperatures = torch.linspace(first, last, len(steps)).tolist()

        def cache_conditioning(tensors: Mapping[str, Tensor]) -> list[BlockInputs]:
            semantic = self.guided_semantic(tensors, params)
            return [
                BlockInputs(steps, self.decoder.cache_conditioning(semantic, tensors.get(TEXT)))
            ]

        with self.placement.on_device(self.decoder):
            tokens = denoise(
                self.predict,
                cache_conditioning,
                tokens,
                tensors,
                params,
                sampler=self,
                solver=partial(
                    sample_tokens,
                    times=params.config.times,
                    choose=lambda logits, i: draw_tokens(logits, temperatures[i], uniform()),
                    uniform=uniform,
                ),
            )
        with self.placement.on_device(self.vqgan):
            return self.vqgan.quantizer.lookup(tokens) / self.vqgan.scale_factor

    def _initial_tokens(self, tokens: Tensor | None, uniform: Tensor) -> Tensor:
        if tokens is None:
            return random_tokens(uniform, self.decoder.codebook_size)
        if tokens.is_floating_point() or tokens.shape != uniform.shape:
            raise ValueError(
                f"latents have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; version 1's "
                f"Stage B starts from tokens of shape {tuple(uniform.shape)}"
            )
        return tokens.to(uniform.device)
