"""Stage B: DiffNeXt and the Semantic Compressor, trained together (arXiv 2306.00637, 3.2)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch, num_unique_samples
from wuerstchen_pl.diffusion.objective import P2Form, noise_error, p2_weight, weighted_mean
from wuerstchen_pl.diffusion.sampler import SamplerName, generators_from_seeds, randn
from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps
from wuerstchen_pl.distributed.fsdp2 import unsharded
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.batch_rng import validation_losses
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.stage import OptimizerFactory, Stage
from wuerstchen_pl.stages.textual_inversion import learn_words
from wuerstchen_pl.stages.timestep_bins import TimestepBins
from wuerstchen_pl.transfer import to_device


class StageB(Stage):
    """Noise prediction in Stage A's unquantized latents, conditioned on semantic latents.

    Args:
        stage_a: the trained Stage A; frozen.
        diffnext: the denoiser.
        compressor: images -> semantic latents, trained with the denoiser.
        text_encoder: frozen; None trains without text.
        adapter: trained instead of denoiser and compressor, which are those of a base model.
        words: likewise, new words of the text encoder.
        optimizer: builds an optimizer over denoiser and compressor.
        lr_schedule: step -> factor on the learning rate.
        ema: moving average of the trainable weights.
        p2: form of the loss weight; ``none`` disables it. The paper states a weight for Stage C
            only, but the released code weights both stages.
        semantic_drop_prob: probability that a sample's semantic latents are zeroed (code: 0.05).
        semantic_noise_prob: probability that a sample's semantic latents are noised, at a time
            uniform in [0, 0.5), unless they are zeroed (code: 0.3).
        text_drop_prob: probability that a caption is replaced with the empty one (code: 0.05).
        frozen_precision: precision of Stage A and the text encoder.
        seed: seed of the random numbers of training.
    """

    name = "b"
    stage_a: StageA
    compressor: SemanticCompressor
    text_encoder: TextEncoder | None

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
            optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed,
            frozen_precision=frozen_precision,
        )  # fmt: skip
        if stage_a.latent_channels != diffnext.latent_channels:
            raise ValueError(
                f"diffnext.latent_channels={diffnext.latent_channels}, but Stage A's latents have "
                f"{plural(stage_a.latent_channels, 'channel')}; set them equal"
            )
        if (text_encoder is None) != (diffnext.text_dim is None):
            raise ValueError(
                f"diffnext.text_dim={diffnext.text_dim} and text_encoder disagree; "
                "set both or neither"
            )
        if text_encoder is not None and text_encoder.is_random:
            raise ValueError(
                "text_encoder.weights=null leaves a frozen text encoder random; set it to CLIP's "
                "weights"
            )
        self.frozen.register("stage_a", stage_a)
        self.frozen.register("text_encoder", text_encoder)
        self.diffnext = diffnext
        if adapter is not None:
            adapter.add_to_base(diffnext)
            self.adapters["diffnext"] = adapter
        if words is not None:
            learn_words(self, words, "diffnext")
        if adapter is None and words is None:
            self.add_module("compressor", compressor)
        else:
            self.frozen.register("compressor", compressor)
        self.schedule, self.timestep_bins = CosineSchedule(), TimestepBins()
        self.p2: P2Form = p2
        self.semantic_drop_prob, self.semantic_noise_prob = semantic_drop_prob, semantic_noise_prob
        self.text_drop_prob = text_drop_prob

    @property
    def size_multiple(self) -> int:
        """Stage A's factor times the denoiser's."""
        return self.stage_a.size_multiple * self.diffnext.size_multiple

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image of (height, width) pixels."""
        return self.compressor.latent_size(height, width)

    @property
    def latent_channels(self) -> int:
        """Channels of the semantic latents."""
        return self.compressor.latent_channels

    # Interface for Stage C

    @property
    def encoding(self) -> SemanticCompressor:
        """The network that ``encode`` runs; caches are keyed by its fingerprint."""
        return self.compressor

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) semantic latents."""
        return self.compressor(images)

    @torch.no_grad()
    def decode(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str] | None = None,
        num_steps: int = 12,
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
            num_steps: denoising steps (paper: 12).
            guidance_scale: guidance toward the semantic latents; 1 or less disables it (paper: 4).
            method: ``ddpm`` or ``ddim``.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        return self.decoder_sampler()(
            semantic,
            captions,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators_from_seeds(seeds),
            output_type="pt",
            size=size,
            sampler=method,
            progress=False,
        ).images

    def decoder_sampler(self) -> LatentDecoderSampler:
        """The sampler that uses this stage's weights and Stage A's."""
        vqgan = self.stage_a.vqgan
        return LatentDecoderSampler(
            decoder=self.diffnext,
            vqgan=vqgan,
            text_encoder=self.text_encoder,
            latent_dim_scale=self.compressor.resolution_multiple / vqgan.factor,
            placement=DevicePlacement(self.device),
        )

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, seeds: Sequence[int], num_steps: int = 12) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same shape, through compressor, denoiser and Stage A."""
        size = (images.shape[-2], images.shape[-1])
        return self.decode(self.encode(images), size=size, seeds=seeds, num_steps=num_steps)

    # Objective

    def text(self, captions: Sequence[str]) -> Tensor | None:
        """Captions -> (B, L, D) embeddings, or None for a Stage B without text."""
        if self.text_encoder is None:
            return None
        with self.frozen.computing(self.text_encoder, self.device):
            return self.text_encoder(captions)

    def loss(
        self, x0: Tensor, t: Tensor, noise: Tensor, semantic: Tensor, text: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """p2(t) |noise - prediction|^2 of each sample, (B,) (section 3.3); see ``noise_error``."""
        pred = self.diffnext(self.schedule.add_noise(x0, t, noise), t, semantic, text)
        return p2_weight(self.schedule, t, self.p2) * noise_error(pred, noise, mask)

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

    def latents(self, batch: Batch) -> Tensor:
        """Stage A's latents of a batch, from the cache or encoded now."""
        if "latents" in batch:
            return batch["latents"]
        with self.frozen.inference(self.stage_a.encoding, self.device):
            return self.stage_a.encode(batch["image"])

    def semantic(self, batch: Batch) -> Tensor:
        """The semantic latents of a batch, with gradients if the compressor is trained."""
        if "compressor" not in self.frozen:
            return self.encode(batch["image"])
        with self.frozen.inference(self.compressor, self.device):
            return self.encode(batch["image"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sample times, noise and conditioning dropout; return the loss."""
        x0 = self.latents(batch)
        rng = self.batch_rng(len(x0), batch_idx)
        semantic = self.semantic(batch)
        uniform = to_device(rng.uniform(2), x0.device)
        semantic_t = to_device(rng.uniform() * 0.5, x0.device)
        semantic = self.corrupt(semantic, uniform, semantic_t, rng.noise(semantic))
        text = encode_captions(batch, self.text, rng.uniform() < self.text_drop_prob)
        t = to_device(sample_timesteps(rng.uniform()), x0.device)
        losses = self.loss(x0, t, rng.noise(x0), semantic, text, batch.get("mask"))
        self.timestep_bins.add(t, losses)
        loss = weighted_mean(losses, batch.get("weight"))
        self.log_means({"loss": loss})
        return loss

    # Validation, with EMA weights

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 4) times in (0, 1), derived from ``batch["key"]``, and the losses at these times."""
        x0, text = self.latents(batch), encode_captions(batch, self.text)
        semantic = self.semantic(batch)

        def loss(t: Tensor, noise: Tensor) -> Tensor:
            return self.loss(x0, t, noise, semantic, text, batch.get("mask"))

        return validation_losses(loss, batch["key"], x0)

    def validate(self, batch: Batch) -> None:
        """Log the mean of ``validation_losses``."""
        losses = self.validation_losses(batch)[1]
        self.log("val/loss", losses.mean(), batch_size=num_unique_samples(batch), sync_dist=True)

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
