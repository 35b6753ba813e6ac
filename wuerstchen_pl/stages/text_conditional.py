"""Text-conditional noise prediction in the latents of a frozen stage: Stage C and the baseline."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch, num_unique_samples
from wuerstchen_pl.diffusion.latent_scaling import LatentScaling
from wuerstchen_pl.diffusion.objective import P2Form, noise_error, p2_weight, weighted_mean
from wuerstchen_pl.diffusion.sampler import SamplerName, generators_from_seeds
from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.stages.batch_rng import BatchRNG, validation_losses
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.frozen_base import freeze_base
from wuerstchen_pl.stages.preservation import PriorPreservation
from wuerstchen_pl.stages.stage import OptimizerFactory, Stage
from wuerstchen_pl.stages.text_checks import check_text_networks
from wuerstchen_pl.stages.text_grid import text_grid
from wuerstchen_pl.stages.textual_inversion import learn_words
from wuerstchen_pl.stages.timestep_bins import TimestepBins
from wuerstchen_pl.transfer import to_device


class TextConditionalStage(Stage):
    """Base of StageC and StageLDM; a subclass defines the frozen stage that encodes and decodes.

    Args:
        prior: the denoiser.
        text_encoder: captions -> text embeddings.
        adapter: trained instead of the weights of the prior, which are those of a base model; None
            trains the prior itself.
        text_adapter: trained with the adapter of the prior, or alone if that is None; None leaves
            the text encoder as it is.
        words: trained instead of the networks, which are those of a base model; None trains them.
        preservation: keeps the meaning of a caption while an adapter is trained; None does not.
        train_text_encoder: train it with the prior (tiny preset); False freezes it.
        text_encoder_lr: learning rate of the text encoder or its adapter; None is that of the
            optimizer.
        latent_channels: channels of the frozen stage's latents.
        optimizer: builds an optimizer over all weights that are not frozen.
        lr_schedule: step -> factor on the learning rate.
        ema: moving average of the trainable weights.
        p2: form of the loss weight; ``none`` disables it.
        caption_drop_prob: probability that a caption is replaced with the empty one, which trains
            the unconditional branch of classifier-free guidance (0.05).
        scaling: maps the frozen stage's latents to the denoiser's scale.
        frozen_precision: precision of the frozen networks.
        seed: seed of the random numbers of training.
    """

    TRAINING_ONLY = (*Stage.TRAINING_ONLY, "preservation")
    grid_sampling: Mapping[str, Any] = {"num_steps": 20}  # arguments of ``sample``
    text_encoder: TextEncoder

    def __init__(
        self,
        *,
        prior: Prior | UNet,
        text_encoder: TextEncoder,
        adapter: Adapter | None,
        text_adapter: Adapter | None,
        words: NewWords | None,
        preservation: PriorPreservation | None,
        train_text_encoder: bool,
        text_encoder_lr: float | None,
        latent_channels: int,
        optimizer: OptimizerFactory | None,
        lr_schedule: Callable[[int], float] | None,
        ema: EMA | None,
        p2: P2Form,
        caption_drop_prob: float,
        scaling: LatentScaling,
        frozen_precision: FrozenPrecision,
        seed: int,
    ) -> None:
        super().__init__(
            optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed,
            frozen_precision=frozen_precision,
        )  # fmt: skip
        check_text_networks(
            prior, text_encoder, latent_channels=latent_channels, text_adapter=text_adapter,
            train_text_encoder=train_text_encoder, text_encoder_lr=text_encoder_lr,
        )  # fmt: skip
        self.prior = prior
        if adapter is not None:
            adapter.add_to_base(prior)
            self.adapters["prior"] = adapter
        elif text_adapter is not None:
            freeze_base(self, "prior")
        elif preservation is not None:
            raise ValueError(
                "preservation keeps what the model predicts without its adapter; set "
                "experiment=dreambooth or stage.adapter, or stage.preservation=null"
            )
        if preservation is not None and preservation.num_class_images and train_text_encoder:
            raise ValueError(
                "preservation.num_class_images is for a frozen text encoder; set it to 0, or "
                "train_text_encoder=false"
            )
        self.preservation = preservation
        if text_adapter is not None:
            text_adapter.add_to_base(text_encoder, "stage.text_adapter")
            self.adapters["text_encoder"] = text_adapter
        self.trains_text = train_text_encoder or text_adapter is not None
        if self.trains_text:
            self.add_module("text_encoder", text_encoder)
        else:
            self.frozen.register("text_encoder", text_encoder)
        if words is not None:
            learn_words(self, words, "prior")
        self.text_encoder_lr = text_encoder_lr
        self.schedule = CosineSchedule()
        self.timestep_bins = TimestepBins()
        self.p2: P2Form = p2
        self.caption_drop_prob = caption_drop_prob
        self.scaling = scaling

    # The frozen stage

    @abstractmethod
    def encode_semantic(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, S, h, w) in the frozen stage's scale."""

    @abstractmethod
    def decode_semantic(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str],
    ) -> Tensor:
        """Latents (B, S, h, w) in the frozen stage's scale -> (B, 3, *size) in [0, 1]."""

    @property
    @abstractmethod
    def encoding(self) -> nn.Module:
        """The frozen network that ``encode_semantic`` runs."""

    @property
    @abstractmethod
    def resolution_multiple(self) -> float:
        """Pixels per latent position along a side."""

    # Optimization

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for the prior or its adapter, and one for the text encoder or its adapter."""
        if not self.trains_text:
            return super().parameter_groups()
        encoder = [p for p in self.text_encoder.parameters() if p.requires_grad]
        prior = [p for p in self.prior.parameters() if p.requires_grad]
        lr = {} if self.text_encoder_lr is None else {"lr": self.text_encoder_lr}
        text = {"params": encoder, "name": "text_encoder", **lr}
        return [{"params": prior}, text] if prior else [text]

    # Latents

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) latents in the denoiser's scale."""
        return self.scaling.normalize(self.encode_semantic(images))

    def latents(self, batch: Batch) -> Tensor:
        """(B, S, h, w) latents in the denoiser's scale, from the cache or encoded now."""
        if "semantic" in batch:
            return self.scaling.normalize(batch["semantic"])
        with self.frozen.inference(self.encoding, self.device):
            return self.encode(batch["image"])

    def text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, L, D) embeddings, with gradients if the text encoder or words learn."""
        if self.trains_text:
            return self.text_encoder(captions)
        with self.frozen.computing(self.text_encoder, self.device):
            return self.text_encoder(captions)

    @torch.no_grad()
    def sample(
        self, captions: Sequence[str], *, size: tuple[int, int], seeds: Sequence[int],
        num_steps: int = 60, guidance_scale: float = 4.0, method: SamplerName = "ddpm",
        control: Control | None = None,
    ) -> Tensor:  # fmt: skip
        """Generate latents from captions.

        Args:
            captions: B captions.
            size: (height, width) in pixels of the images to generate.
            seeds: one per image.
            num_steps: denoising steps (paper: 60).
            guidance_scale: guidance away from the empty caption; 1 or less disables it (paper: 4).
            method: name of the sampler.
            control: what a ControlNet reads.

        Returns:
            (B, S, h, w) in the frozen stage's scale, for ``decode_semantic``.
        """
        return self.prior_sampler()(
            captions, *size, num_inference_steps=num_steps, guidance_scale=guidance_scale,
            generator=generators_from_seeds(seeds), sampler=method, control=control, progress=False,
        )[0]  # fmt: skip

    def prior_sampler(self) -> PriorSampler:
        """The sampler that uses this stage's weights."""
        return PriorSampler(
            prior=cast(Prior, self.prior),
            text_encoder=self.text_encoder,
            semantic_scale=self.scaling.scale,
            semantic_shift=self.scaling.shift,
            resolution_multiple=self.resolution_multiple,
            placement=DevicePlacement(self.device),
        )

    # Objective

    def on_train_start(self) -> None:
        """See ``Stage``; the class images of prior preservation are drawn here."""
        super().on_train_start()
        if self.preservation is not None:
            self.preservation.draw_class_images(self)

    def control(self, batch: Batch, rng: BatchRNG | None = None) -> Control | None:
        """What a ControlNet reads, in training with the batch's ``rng``; None without one."""
        return None

    def predict(self, xt: Tensor, t: Tensor, text: Tensor, control: Control | None) -> Tensor:
        """The prediction of the noise."""
        return self.prior(xt, t, text)

    def loss(
        self, x0: Tensor, t: Tensor, noise: Tensor, text: Tensor,
        mask: Tensor | None = None, control: Control | None = None,
    ) -> Tensor:  # fmt: skip
        """p2(t) |noise - prediction|^2 of each sample, (B,) (section 3.3); see ``noise_error``."""
        pred = self.predict(self.schedule.add_noise(x0, t, noise), t, text, control)
        return p2_weight(self.schedule, t, self.p2) * noise_error(pred, noise, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sample times, noise and caption dropout; return the loss."""
        x0 = self.latents(batch)
        rng = self.batch_rng(len(x0), batch_idx)
        text = encode_captions(batch, self.text, rng.uniform() < self.caption_drop_prob)
        t = to_device(sample_timesteps(rng.uniform()), x0.device)
        noise, control = rng.noise(x0), self.control(batch, rng)
        losses = self.loss(x0, t, noise, cast(Tensor, text), batch.get("mask"), control)
        self.timestep_bins.add(t, losses)
        loss = weighted_mean(losses, batch.get("weight"))
        if self.preservation is None:
            self.log_means({"loss": loss})
            return loss
        kept = self.preservation.loss(self, x0, rng)
        self.log_means({"loss": loss, "preservation": kept})
        return loss + kept

    # Validation, with EMA weights

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1), derived from ``batch["key"]``, and the losses at these times."""
        x0, text = self.latents(batch), cast(Tensor, encode_captions(batch, self.text))
        control = self.control(batch)

        def loss(t: Tensor, noise: Tensor) -> Tensor:
            return self.loss(x0, t, noise, text, batch.get("mask"), control)

        return validation_losses(loss, batch["key"], x0)

    def validate(self, batch: Batch) -> None:
        """Log the mean of ``validation_losses``."""
        losses = self.validation_losses(batch)[1]
        batch_size = num_unique_samples(batch)
        self.log("val/loss", losses.mean(), batch_size=batch_size, sync_dist=True)

    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """See ``text_grid``."""
        return text_grid(self, batch)
