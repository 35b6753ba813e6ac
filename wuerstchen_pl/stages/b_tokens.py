"""Version 1's Stage B: a Paella classifies Stage A's tokens (arXiv 2306.00637v1).

Published as ``train_stage_B.py`` in dome272/Wuerstchen (MIT).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, rand
from wuerstchen_pl.diffusion.tokens import (
    is_replaced,
    random_tokens,
    replace_tokens,
    sample_token_times,
    token_error,
    token_weights,
)
from wuerstchen_pl.distributed.fsdp2 import unsharded
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.token_decoder import TokenDecoderSampler
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.batch_rng import BatchRNG, validation_losses
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.decoder_stage import DecoderStage
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.stage import OptimizerFactory
from wuerstchen_pl.transfer import to_device


class TokenStageB(DecoderStage):
    """Classification of Stage A's tokens, of which a share is random, by semantic latents.

    Args:
        paella: the classifier.

    The other arguments are those of ``DecoderStage``.
    """

    NETWORK = "paella"
    SAMPLER = TokenDecoderSampler
    NUM_STEPS = 8
    paella: Paella

    def __init__(
        self,
        *,
        stage_a: StageA,
        paella: Paella,
        compressor: SemanticCompressor,
        text_encoder: TextEncoder | None = None,
        adapter: Adapter | None = None,
        words: NewWords | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        semantic_drop_prob: float = 0.05,
        semantic_noise_prob: float = 0.3,
        text_drop_prob: float = 0.05,
        frozen_precision: FrozenPrecision = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(
            stage_a=stage_a,
            network=paella,
            compressor=compressor,
            text_encoder=text_encoder,
            adapter=adapter,
            words=words,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            ema=ema,
            semantic_drop_prob=semantic_drop_prob,
            semantic_noise_prob=semantic_noise_prob,
            text_drop_prob=text_drop_prob,
            frozen_precision=frozen_precision,
            seed=seed,
        )
        if (codes := stage_a.vqgan.quantizer.codebook.num_embeddings) != paella.codebook_size:
            raise ValueError(
                f"paella.codebook_size={paella.codebook_size}, but Stage A has {codes} codes; set "
                "them equal"
            )

    # Objective

    def loss(
        self, tokens: Tensor, t: Tensor, uniform: Tensor, semantic: Tensor, text: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Weighted cross-entropy of each sample, (B,); see ``token_error``.

        Args:
            tokens: (B, H, W), the clean ones.
            t: (B,) share of the tokens that are replaced.
            uniform: (B, 2, H, W) in [0, 1): where tokens are replaced, and by which.
            semantic: (B, S, h, w).
            text: (B, L, D), or None for a Stage B without text.
            mask: see ``token_weights``.
        """
        where, which = uniform.unbind(dim=1)
        replacements = random_tokens(which, self.paella.codebook_size)
        logits = self.paella(replace_tokens(tokens, replacements, where, t), t, semantic, text)
        return token_error(logits, tokens, token_weights(is_replaced(where, t), t, mask))

    def latents(self, batch: Batch) -> Tensor:
        """Stage A's tokens (B, H, W) of a batch, from cached latents or encoded now."""
        with self.frozen.inference(self.stage_a.encoding, self.device):
            vqgan = self.stage_a.vqgan
            cached = batch.get("latents")
            latents = self.stage_a.encode(batch["image"]) if cached is None else cached
            return vqgan.quantizer.indices(latents * vqgan.scale_factor)

    def training_losses(
        self,
        latents: Tensor,
        semantic: Tensor,
        text: Tensor | None,
        rng: BatchRNG,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Random times and the losses of the samples at these, (B,) each."""
        t = to_device(sample_token_times(rng.uniform()), latents.device)
        uniform = to_device(rng.uniform(2, *latents.shape[1:]), latents.device)
        return t, self.loss(latents, t, uniform, semantic, text, mask)

    # Validation, with EMA weights

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1), derived from ``batch["key"]``, and the losses at these times."""
        tokens, text = self.latents(batch), encode_captions(batch, self.text)
        semantic = self.semantic(batch)
        shaped = semantic.new_empty((len(tokens), 2, *tokens.shape[1:]), dtype=torch.float32)

        def loss(t: Tensor, noise: Tensor) -> Tensor:
            uniform = torch.special.ndtr(noise)  # of standard normal numbers
            return self.loss(tokens, t, uniform, semantic, text, batch.get("mask"))

        return validation_losses(loss, batch["key"], shaped)

    @torch.no_grad()
    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Original, replaced tokens, the likeliest ones (EMA), samples with raw and EMA weights."""
        images, captions = batch["image"], batch["caption"]
        rows, size = len(images), (images.shape[-2], images.shape[-1])
        tokens, quantizer = self.latents(batch), self.stage_a.vqgan.quantizer
        t = torch.full((rows,), 0.5, device=tokens.device)
        shape, generators = (rows, 2, *tokens.shape[1:]), generators_from_seeds(range(rows))
        where, which = rand(shape, generators, tokens.device).unbind(dim=1)
        noised = replace_tokens(tokens, random_tokens(which, self.paella.codebook_size), where, t)

        def decoded(tokens: Tensor) -> Tensor:
            codes = quantizer.lookup(tokens)
            return self.stage_a.decode(codes / self.stage_a.vqgan.scale_factor)

        def sampled() -> Tensor:
            return self.decode(self.encode(images), size=size, seeds=range(rows), captions=captions)

        with unsharded(self):
            raw = sampled()
        with self.ema.applied(self):
            logits = self.paella(noised, t, self.encode(images), self.text(captions))
            with_ema = sampled()
        return {
            "original": images,
            "replaced, t=0.5": decoded(noised),
            "one step (EMA)": decoded(logits.argmax(dim=1)),
            "sample": raw,
            "sample (EMA)": with_ema,
        }
