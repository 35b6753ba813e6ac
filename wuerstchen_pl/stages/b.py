"""Version 2's Stage B: DiffNeXt denoises Stage A's latents (arXiv 2306.00637, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.objective import P2Form, noise_error, p2_weight
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.diffusion.schedule import sample_timesteps
from wuerstchen_pl.distributed.fsdp2 import unsharded
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.batch_rng import BatchRNG, validation_losses
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.decoder_stage import DecoderStage
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.stage import OptimizerFactory
from wuerstchen_pl.transfer import to_device


class StageB(DecoderStage):
    """Noise prediction in Stage A's unquantized latents, conditioned on semantic latents.

    Args:
        diffnext: the denoiser.
        p2: form of the loss weight; ``none`` disables it. The paper states a weight for Stage C
            only, but the released code weights both stages.

    The other arguments are those of ``DecoderStage``.
    """

    NETWORK = "diffnext"
    SAMPLER = LatentDecoderSampler
    NUM_STEPS = 12
    diffnext: DiffNeXt

    def __init__(
        self,
        *,
        stage_a: StageA,
        diffnext: DiffNeXt,
        compressor: SemanticCompressor,
        text_encoder: TextEncoder | None = None,
        adapter: Adapter | None = None,
        words: NewWords | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        p2: P2Form = "code",
        semantic_drop_prob: float = 0.05,
        semantic_noise_prob: float = 0.3,
        text_drop_prob: float = 0.05,
        frozen_precision: FrozenPrecision = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(
            stage_a=stage_a,
            network=diffnext,
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
        if stage_a.latent_channels != diffnext.latent_channels:
            raise ValueError(
                f"diffnext.latent_channels={diffnext.latent_channels}, but Stage A's latents have "
                f"{plural(stage_a.latent_channels, 'channel')}; set them equal"
            )
        self.p2: P2Form = p2

    # Objective

    def loss(
        self, x0: Tensor, t: Tensor, noise: Tensor, semantic: Tensor, text: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """p2(t) |noise - prediction|^2 of each sample, (B,) (section 3.3); see ``noise_error``."""
        pred = self.diffnext(self.schedule.add_noise(x0, t, noise), t, semantic, text)
        return p2_weight(self.schedule, t, self.p2) * noise_error(pred, noise, mask)

    def latents(self, batch: Batch) -> Tensor:
        """Stage A's latents of a batch, from the cache or encoded now."""
        if "latents" in batch:
            return batch["latents"]
        with self.frozen.inference(self.stage_a.encoding, self.device):
            return self.stage_a.encode(batch["image"])

    def training_losses(
        self,
        latents: Tensor,
        semantic: Tensor,
        text: Tensor | None,
        rng: BatchRNG,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Random times and the losses of the samples at these, (B,) each."""
        t = to_device(sample_timesteps(rng.uniform()), latents.device)
        return t, self.loss(latents, t, rng.noise(latents), semantic, text, mask)

    # Validation, with EMA weights

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1), derived from ``batch["key"]``, and the losses at these times."""
        x0, text = self.latents(batch), encode_captions(batch, self.text)
        semantic = self.semantic(batch)

        def loss(t: Tensor, noise: Tensor) -> Tensor:
            return self.loss(x0, t, noise, semantic, text, batch.get("mask"))

        return validation_losses(loss, batch["key"], x0)

    @torch.no_grad()
    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Original, noised, one-step x0 prediction (EMA), samples with raw and EMA weights."""
        images, captions = batch["image"], batch["caption"]
        rows, size = len(images), (images.shape[-2], images.shape[-1])
        x0 = self.latents(batch)
        t = torch.full((rows,), 0.5, device=x0.device)
        noise = randn(x0.shape, generators_from_seeds(range(rows)), x0.device)
        xt = self.schedule.add_noise(x0, t, noise)

        def sampled() -> Tensor:
            return self.decode(self.encode(images), size=size, seeds=range(rows), captions=captions)

        with unsharded(self):
            raw = sampled()
        with self.ema.applied(self):
            pred = self.diffnext(xt, t, self.encode(images), self.text(captions))
            with_ema = sampled()
        return {
            "original": images,
            "noised, t=0.5": self.stage_a.decode(xt),
            "one step (EMA)": self.stage_a.decode(self.schedule.predict_x0(xt, t, pred)),
            "sample": raw,
            "sample (EMA)": with_ema,
        }
