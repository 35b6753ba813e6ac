"""What both versions of Stage B share: networks, conditioning, and training step.

A decoder of semantic latents is trained together with the Semantic Compressor (arXiv 2306.00637,
section 3.2).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch, num_unique_samples
from wuerstchen_pl.diffusion.objective import weighted_mean
from wuerstchen_pl.diffusion.sampler import SamplerName, generators_from_seeds
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.batch_rng import BatchRNG
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.semantic_encoder import SemanticEncoder
from wuerstchen_pl.stages.stage import OptimizerFactory
from wuerstchen_pl.stages.textual_inversion import learn_words
from wuerstchen_pl.stages.timestep_bins import TimestepBins
from wuerstchen_pl.transfer import to_device


class DecoderStage(SemanticEncoder):
    """Base of both versions of Stage B; a subclass defines objective and sampling.

    Args:
        stage_a: the trained Stage A; frozen.
        network: what decodes; an attribute of the name ``NETWORK``.
        compressor: images -> semantic latents, trained with the network.
        text_encoder: frozen; None trains without text.
        adapter: trained instead of network and compressor, which are those of a base model.
        words: likewise, new words of the text encoder.
        optimizer: builds an optimizer over network and compressor.
        lr_schedule: step -> factor on the learning rate.
        ema: moving average of the trainable weights.
        semantic_drop_prob: probability that a sample's semantic latents are zeroed (code: 0.05).
        semantic_noise_prob: probability that a sample's semantic latents are noised, at a time
            uniform in [0, 0.5), unless they are zeroed (code: 0.3).
        text_drop_prob: probability that a caption is replaced with the empty one (code: 0.05).
        frozen_precision: precision of Stage A and the text encoder.
        seed: seed of the random numbers of training.
    """

    name = "b"
    NETWORK: ClassVar[str]
    """The attribute and the argument of the network that decodes."""
    SAMPLER: ClassVar[Callable[..., DecoderSampler]]
    """The class of its sampler."""
    NUM_STEPS: ClassVar[int]
    """Steps of sampling in grids."""
    stage_a: StageA
    text_encoder: TextEncoder | None

    def __init__(
        self,
        *,
        stage_a: StageA,
        network: DiffNeXt | Paella,
        compressor: SemanticCompressor,
        text_encoder: TextEncoder | None,
        adapter: Adapter | None,
        words: NewWords | None,
        optimizer: OptimizerFactory | None,
        lr_schedule: Callable[[int], float] | None,
        ema: EMA | None,
        semantic_drop_prob: float,
        semantic_noise_prob: float,
        text_drop_prob: float,
        frozen_precision: FrozenPrecision,
        seed: int,
    ) -> None:
        super().__init__(
            optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed,
            frozen_precision=frozen_precision,
        )  # fmt: skip
        name = self.NETWORK
        if (text_encoder is None) != (network.text_dim is None):
            raise ValueError(
                f"{name}.text_dim={network.text_dim} and text_encoder disagree; set both or neither"
            )
        if text_encoder is not None and text_encoder.is_random:
            raise ValueError(
                "text_encoder.weights=null leaves a frozen text encoder random; set it to CLIP's "
                "weights"
            )
        self.frozen.register("stage_a", stage_a)
        self.frozen.register("text_encoder", text_encoder)
        self.add_module(name, network)
        if adapter is not None:
            adapter.add_to_base(network)
            self.adapters[name] = adapter
        if words is not None:
            learn_words(self, words, name)
        if adapter is None and words is None:
            self.add_module("compressor", compressor)
        else:
            self.frozen.register("compressor", compressor)
        self.schedule, self.timestep_bins = CosineSchedule(), TimestepBins()
        self.semantic_drop_prob, self.semantic_noise_prob = semantic_drop_prob, semantic_noise_prob
        self.text_drop_prob = text_drop_prob

    @property
    def network(self) -> Any:
        """The network that decodes."""
        return getattr(self, self.NETWORK)

    @property
    def size_multiple(self) -> int:
        """Stage A's factor times the network's."""
        return self.stage_a.size_multiple * self.network.size_multiple

    # Sampling

    @torch.no_grad()
    def decode(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance_scale: float = 1.0,
        method: SamplerName = "ddpm",
    ) -> Tensor:
        """Generate images from semantic latents.

        Args:
            semantic: (B, S, h, w).
            size: (height, width) of the images; sizes that are not multiples of
                ``size_multiple`` are generated larger and cropped.
            seeds: one per image.
            captions: one per image, for a Stage B with text; None uses the empty caption.
            num_steps: steps; None is ``NUM_STEPS``.
            guidance_scale: guidance toward the semantic latents; 1 or less disables it (paper: 4).
            method: name of the sampler, unless tokens are sampled.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        return self.decoder_sampler()(
            semantic,
            captions,
            num_inference_steps=num_steps or self.NUM_STEPS,
            guidance_scale=guidance_scale,
            generator=generators_from_seeds(seeds),
            output_type="pt",
            size=size,
            sampler=method,
            progress=False,
        ).images

    def decoder_sampler(self) -> DecoderSampler:
        """The sampler that uses this stage's weights and Stage A's."""
        vqgan = self.stage_a.vqgan
        return self.SAMPLER(
            decoder=self.network,
            vqgan=vqgan,
            text_encoder=self.text_encoder,
            latent_dim_scale=self.compressor.resolution_multiple / vqgan.factor,
            placement=DevicePlacement(self.device),
        )

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, seeds: Sequence[int], num_steps: int | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same shape, through compressor, Stage B and Stage A."""
        size = (images.shape[-2], images.shape[-1])
        return self.decode(self.encode(images), size=size, seeds=seeds, num_steps=num_steps)

    # Objective

    def text(self, captions: Sequence[str]) -> Tensor | None:
        """Captions -> (B, L, D) embeddings, or None for a Stage B without text."""
        if self.text_encoder is None:
            return None
        with self.frozen.computing(self.text_encoder, self.device):
            return self.text_encoder(captions)

    def corrupt(self, semantic: Tensor, uniform: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Zero or noise semantic latents, so that Stage B tolerates Stage C's errors.

        Args:
            semantic: (B, S, h, w).
            uniform: (B, 2) uniform in [0, 1), compared with the probabilities of zeroing and of
                noising.
            t: (B,) uniform in [0, 0.5), the diffusion time of the noise.
            noise: standard normal, in the shape of ``semantic``.
        """
        keep = (uniform[:, 0] >= self.semantic_drop_prob)[:, None, None, None]
        is_noised = (uniform[:, 1] < self.semantic_noise_prob)[:, None, None, None]
        return torch.where(is_noised, self.schedule.add_noise(semantic, t, noise), semantic) * keep

    def semantic(self, batch: Batch) -> Tensor:
        """The semantic latents of a batch, with gradients if the compressor is trained."""
        if "compressor" not in self.frozen:
            return self.encode(batch["image"])
        with self.frozen.inference(self.compressor, self.device):
            return self.encode(batch["image"])

    @abstractmethod
    def latents(self, batch: Batch) -> Tensor:
        """What is denoised, Stage A's latents (B, C, H, W) or tokens (B, H, W)."""

    @abstractmethod
    def training_losses(
        self,
        latents: Tensor,
        semantic: Tensor,
        text: Tensor | None,
        rng: BatchRNG,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Random times and the losses of the samples at these, (B,) each."""

    @abstractmethod
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1), derived from ``batch["key"]``, and the losses at these times."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sample times, noise and conditioning dropout; return the loss."""
        latents = self.latents(batch)
        rng = self.batch_rng(len(latents), batch_idx)
        semantic = self.semantic(batch)
        uniform = to_device(rng.uniform(2), latents.device)
        semantic_t = to_device(rng.uniform() * 0.5, latents.device)
        semantic = self.corrupt(semantic, uniform, semantic_t, rng.noise(semantic))
        text = encode_captions(batch, self.text, rng.uniform() < self.text_drop_prob)
        t, losses = self.training_losses(latents, semantic, text, rng, batch.get("mask"))
        self.timestep_bins.add(t, losses)
        loss = weighted_mean(losses, batch.get("weight"))
        self.log_means({"loss": loss})
        return loss

    def validate(self, batch: Batch) -> None:
        """Log the mean of ``validation_losses``."""
        losses = self.validation_losses(batch)[1]
        self.log("val/loss", losses.mean(), batch_size=num_unique_samples(batch), sync_dist=True)
