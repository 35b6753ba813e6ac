"""Stage C: training the text-conditional prior (arXiv 2306.00637, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from wuerstchen_pl.diffusion.objective import P2Form, noise_error, p2_weight
from wuerstchen_pl.diffusion.sampler import SamplerName, generators_from_seeds, randn
from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps
from wuerstchen_pl.distributed.fsdp2 import unsharded
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.stages.b import StageB
from wuerstchen_pl.stages.batch_rng import validation_losses
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import (
    Batch,
    OptimizerFactory,
    Stage,
    encode_captions,
    num_unique_samples,
)
from wuerstchen_pl.stages.timestep_bins import TimestepBins


class StageC(Stage):
    """Noise prediction in the semantic latents, conditioned on text.

    Args:
        decoder: the trained Stage B, which holds Stage A; frozen.
        prior: the denoiser.
        text_encoder: captions -> token states.
        train_text_encoder: True trains it with the prior (tiny preset), False freezes it.
        optimizer: over everything that is not frozen.
        lr_schedule: of the learning rate, by step.
        ema: average of the trainable weights.
        p2: form of the loss weight.
        caption_drop_prob: share of captions replaced by the empty one (0.05); the empty caption is
            the unconditional branch of guidance.
        semantic_shift: Stage C works in (s + shift) / scale of the compressor's s (v1, v2: 1).
        semantic_scale: see ``semantic_shift`` (v1, v2: 42).
        seed: of the random numbers of training.
    """

    decoder: StageB

    def __init__(
        self,
        *,
        decoder: StageB,
        prior: Prior,
        text_encoder: TextEncoder,
        train_text_encoder: bool = False,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        p2: P2Form = "code",
        caption_drop_prob: float = 0.05,
        semantic_shift: float = 0.0,
        semantic_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed)
        if prior.latent_channels != decoder.latent_channels:
            raise ValueError(
                f"stage.prior.latent_channels={prior.latent_channels}, but the frozen decoder "
                f"gives {decoder.latent_channels}; set them equal"
            )
        if prior.text_dim != text_encoder.width:
            raise ValueError(
                f"stage.prior.text_dim={prior.text_dim}, but stage.text_encoder.width="
                f"{text_encoder.width}; set them equal"
            )
        if not train_text_encoder and text_encoder.weights is None:
            raise ValueError(
                "stage.text_encoder.weights=null leaves a frozen text encoder random; name CLIP's "
                "weights, or set stage.train_text_encoder=true"
            )
        self.register_frozen("decoder", decoder)
        self.prior = prior
        if train_text_encoder:
            self.text_encoder = text_encoder
        else:
            self.register_frozen("text_encoder", text_encoder)
        self.train_text_encoder = train_text_encoder
        self.schedule = CosineSchedule()
        self.timestep_bins = TimestepBins()
        self.p2: P2Form = p2
        self.caption_drop_prob = caption_drop_prob
        self.semantic_shift, self.semantic_scale = semantic_shift, semantic_scale

    @property
    def size_multiple(self) -> int:
        """Stage B's: the prior takes any size."""
        return self.decoder.size_multiple

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image of (height, width) pixels."""
        return self.decoder.semantic_size(height, width)

    # Latents

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) latents in Stage C's scale."""
        return self.from_semantic(self.decoder.encode(images))

    def from_semantic(self, semantic: Tensor) -> Tensor:
        """(B, S, h, w) in the compressor's scale -> in Stage C's."""
        return (semantic + self.semantic_shift) / self.semantic_scale

    def latents(self, batch: Batch) -> Tensor:
        """(B, S, h, w) latents of a batch in Stage C's scale, cached or encoded now."""
        if "semantic" in batch:
            return self.from_semantic(batch["semantic"])
        with torch.no_grad():
            return self.encode(batch["image"])

    def to_semantic(self, latents: Tensor) -> Tensor:
        """(B, S, h, w) in Stage C's scale -> in the compressor's, which Stage B reads."""
        return latents * self.semantic_scale - self.semantic_shift

    def text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, L, D) states, with gradients if the encoder is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
            return self.text_encoder(captions)

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        num_steps: int = 60,
        guidance_scale: float = 4.0,
        method: SamplerName = "ddpm",
    ) -> Tensor:
        """Captions -> semantic latents.

        Args:
            captions: B of them.
            size: (height, width) in pixels of the images to be.
            seeds: one per image.
            num_steps: denoising steps (paper: 60).
            guidance_scale: away from the empty caption; up to 1 is none (paper: 4).
            method: ``ddpm`` or ``ddim``.

        Returns:
            (B, S, h, w) in the compressor's scale, for ``decoder.decode``.
        """
        return self.prior_pipeline()(
            captions,
            *size,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators_from_seeds(seeds),
            sampler=method,
            progress=False,
        )[0]

    def prior_pipeline(self) -> PriorSampler:
        """What draws semantic latents with this stage's weights."""
        return PriorSampler(
            prior=self.prior,
            text_encoder=self.text_encoder,
            semantic_scale=self.semantic_scale,
            semantic_shift=self.semantic_shift,
            resolution_multiple=self.resolution_multiple,
            placement=DevicePlacement(self.device),
        )

    @property
    def resolution_multiple(self) -> float:
        """Pixels to a position of the latents."""
        return self.decoder.compressor.resolution_multiple

    def images(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str],
    ) -> Tensor:
        """Latents as ``sample`` gives them -> (B, 3, *size) in [0, 1]."""
        return self.decoder.decode(semantic, size=size, seeds=seeds, captions=captions)

    # Objective

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        """p2(t) |noise - prediction|^2 of each sample, (B,) (section 3.4)."""
        pred = self.prior(self.schedule.add_noise(x0, t, noise), t, text)
        return p2_weight(self.schedule, t, self.p2) * noise_error(pred, noise)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw times, noise and dropped captions; return the loss."""
        x0 = self.latents(batch)
        rng = self.batch_rng(len(x0), batch_idx)
        text = encode_captions(batch, self.text, rng.uniform() < self.caption_drop_prob)
        t = sample_timesteps(rng.uniform()).to(x0.device)
        losses = self.loss(x0, t, rng.noise(x0), cast(Tensor, text))
        self.timestep_bins.add(t, losses)
        loss = losses.mean()
        self.log_means({"loss": loss})
        return loss

    # Validation, on averaged weights

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1) and the losses there; which, is by ``batch["key"]`` alone."""
        x0, text = self.latents(batch), cast(Tensor, encode_captions(batch, self.text))

        def loss(t: Tensor, noise: Tensor) -> Tensor:
            return self.loss(x0, t, noise, text)

        return validation_losses(loss, batch["key"], x0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The mean of ``validation_losses``."""
        with self.ema.applied(self):
            losses = self.validation_losses(batch)[1]
        self.log("val/loss", losses.mean(), batch_size=num_unique_samples(batch), sync_dist=True)

    @torch.no_grad()
    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Original, noised, x_0 in one step, sample and averaged sample, all through Stage B.

        From a cache, which holds no images, the first is what Stage B makes of the latents.
        """
        captions, x0 = batch["caption"], self.latents(batch)
        size = tuple(batch["image"].shape[-2:]) if "image" in batch else batch["size"]
        seeds = range(len(x0))
        t = torch.full((len(x0),), 0.5, device=x0.device)
        xt = self.schedule.add_noise(
            x0, t, randn(x0.shape, generators_from_seeds(seeds), x0.device)
        )

        def drawn(latents: Tensor) -> Tensor:
            semantic = self.to_semantic(latents)
            return self.images(semantic, size=size, seeds=seeds, captions=captions)

        def sampled() -> Tensor:
            semantic = self.sample(captions, size=size, seeds=seeds, num_steps=20)
            return self.images(semantic, size=size, seeds=seeds, captions=captions)

        with unsharded(self):
            raw = sampled()
        with self.ema.applied(self):
            pred = self.prior(xt, t, self.text(captions))
            averaged = sampled()
        return {
            "original": batch["image"] if "image" in batch else drawn(x0),
            "noised, t=0.5": drawn(xt),
            "one step (EMA)": drawn(self.schedule.predict_x0(xt, t, pred)),
            "sample": raw,
            "sample (EMA)": averaged,
        }
