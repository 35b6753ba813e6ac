"""Stage A: training the VQGAN (arXiv 2306.00637, section 3.1 and appendix E)."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.distributed.fsdp2 import index_copy, unsharded
from wuerstchen_pl.models.discriminator import Discriminator
from wuerstchen_pl.models.vqgan import VQGAN, codebook_usage
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import Batch, OptimizerFactory, Stage, num_unique_samples


class StageA(Stage):
    """Reconstruction, perceptual, adversarial and codebook losses.

    VQGAN and discriminator are two groups of one optimizer: it treats each parameter alone, so that
    it does what two optimizers would, and both are averaged, clipped, accumulated, sharded and
    stored as the other stages are.

    Args:
        vqgan: encoder, codebook and decoder.
        discriminator: the critic; it learns from the first step on.
        perceptual: two images -> (B,) distance; frozen.
        optimizer: over the VQGAN's parameters and the discriminator's.
        lr_schedule: of the learning rate, by step.
        ema: average of the trainable weights.
        mse_weight: weight of the squared error (paper: 1).
        perceptual_weight: weight of the perceptual distance (paper: 0.1).
        adversarial_weight: weight of the adversarial loss (paper: 0.01).
        adversarial_start_step: first step at which it counts (paper: 10,000).
        commitment_weight: weight of the commitment loss (code: 0.25).
        quantize_drop_prob: share of steps that skip quantization (paper: 0.1).
        codebook_restart_every_steps: steps after which codes that nothing used are moved onto latents of the
            present batch.
        seed: of the random numbers of training.
    """

    TRAINING_ONLY = (*Stage.TRAINING_ONLY, "perceptual")

    def __init__(
        self,
        *,
        vqgan: VQGAN,
        discriminator: Discriminator,
        perceptual: nn.Module | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        mse_weight: float = 1.0,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.01,
        adversarial_start_step: int = 10_000,
        commitment_weight: float = 0.25,
        quantize_drop_prob: float = 0.1,
        codebook_restart_every_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed)
        self.vqgan = vqgan
        self.discriminator = discriminator
        self.perceptual: nn.Module | None = None
        if perceptual is not None:
            self.register_frozen("perceptual", perceptual)
        self.mse_weight, self.perceptual_weight = mse_weight, perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start_step = adversarial_start_step
        self.commitment_weight = commitment_weight
        self.quantize_drop_prob = quantize_drop_prob
        self.codebook_restart_every_steps = codebook_restart_every_steps
        codes = vqgan.quantizer.codebook.num_embeddings
        # uses of each code since codes were last revived, and since validation began
        self.register_buffer("code_uses", torch.zeros(codes))
        self.register_buffer("val_code_uses", torch.zeros(codes), persistent=False)

    code_uses: Tensor
    val_code_uses: Tensor

    @property
    def size_multiple(self) -> int:
        """Images are folded into latents of 1 / 2^levels."""
        return self.vqgan.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vqgan.latent_channels

    # What Stage B uses

    @property
    def encoding(self) -> VQGAN:
        """The network that ``encode`` uses."""
        return self.vqgan

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/f, W/f) unquantized latents of unit variance."""
        return self.vqgan.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents -> (B, 3, h f, w f) in [0, 1]."""
        return self.vqgan.decode(latents).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same through the latents, unquantized as Stage B's are."""
        return self.decode(self.encode(images))

    # Losses

    def generator_loss(
        self, images: Tensor, *, quantize: bool, adversarial: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The VQGAN's loss.

        Args:
            images: (B, 3, H, W) in [0, 1].
            quantize: False decodes the latents as they are.
            adversarial: whether the discriminator counts.

        Returns:
            The loss, the reconstruction, and the terms by name, with ``indices`` and ``features``.
        """
        features = self.vqgan.features(images)
        quantized = self.vqgan.quantizer(features)
        decoded = self.vqgan.decode_features(quantized.latents if quantize else features)
        terms = {
            "mse": F.mse_loss(decoded, images),
            "codebook": quantized.codebook_loss,
            "commitment": quantized.commitment_loss,
        }
        loss = self.mse_weight * terms["mse"] + terms["codebook"]
        loss = loss + self.commitment_weight * terms["commitment"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, images).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if adversarial:
            terms["adversarial"] = F.softplus(-self.discriminator.logits(decoded)).mean()
            loss = loss + self.adversarial_weight * terms["adversarial"]
        return loss, decoded, {**terms, "indices": quantized.indices, "features": features}

    def discriminator_loss(self, images: Tensor, decoded: Tensor) -> Tensor:
        """-log D(real) - log(1 - D(fake)), halved; the mean over patches."""
        real = F.softplus(-self.discriminator.logits(images)).mean()
        fake = F.softplus(self.discriminator.logits(decoded.detach())).mean()
        return 0.5 * (real + fake)

    # Training

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The VQGAN's and the discriminator's, apart."""
        parts = {"vqgan": self.vqgan, "discriminator": self.discriminator}
        return [{"params": list(part.parameters()), "name": name} for name, part in parts.items()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of both losses, of which each teaches its own part alone."""
        images = batch["image"]
        rng = self.batch_rng(len(images), batch_idx)
        self.discriminator.requires_grad_(False)
        loss, decoded, terms = self.generator_loss(
            images,
            quantize=rng.batch_uniform() >= self.quantize_drop_prob,
            adversarial=self.global_step >= self.adversarial_start_step,
        )
        self.discriminator.requires_grad_(True)
        critic_loss = self.discriminator_loss(images, decoded)
        self._count_codes(terms.pop("indices"))
        self._latents = rows_of(terms.pop("features").detach())
        self.log_means({"loss": loss, "discriminator": critic_loss, **terms})
        return loss + critic_loss

    def _count_codes(self, indices: Tensor) -> None:
        uses = torch.bincount(indices.flatten(), minlength=len(self.code_uses)).float()
        self.code_uses += self.trainer.strategy.reduce(uses, reduce_op="sum")

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Now and then move the codes that had no use onto present latents, on all processes."""
        if step % self.codebook_restart_every_steps:
            return
        dead = (self.code_uses == 0).nonzero().flatten()
        self.log("train/restarted_codes", float(len(dead)))
        self.code_uses.zero_()
        if len(dead) == 0:
            return
        latents = self._everyones(self._latents)
        chosen = self.batch_rng(1, 0).randint(len(latents), len(dead)).to(latents.device)
        rows, codebook = latents[chosen], self.vqgan.quantizer.codebook.weight
        index_copy(codebook, dead, rows)
        self.ema.overwrite("vqgan.quantizer.codebook.weight", dead, rows)

    def _everyones(self, rows: Tensor) -> Tensor:
        """(N, C) of each process -> those of all: as many of each as the fewest have."""
        counted = torch.tensor(len(rows), device=rows.device)
        fewest = int(self.trainer.strategy.reduce(counted, reduce_op="min"))
        return cast(Tensor, self.all_gather(rows[:fewest])).view(-1, rows.shape[1])

    # Validation, on averaged weights

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's codes."""
        self.val_code_uses.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, and PSNR of the unquantized reconstruction in dB."""
        images = batch["image"]
        with self.ema.applied(self):
            loss, _, terms = self.generator_loss(images, quantize=True, adversarial=False)
            error = F.mse_loss(self.reconstruct(images), images, reduction="none")
        psnr = -10 * error.flatten(1).mean(dim=1).log10().mean()
        codes = len(self.val_code_uses)
        if num_unique_samples(batch):
            self.val_code_uses += torch.bincount(terms["indices"].flatten(), minlength=codes)
        metrics = {"val/loss": loss, "val/psnr": psnr}
        self.log_dict(metrics, batch_size=num_unique_samples(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Codebook use, on all processes together."""
        uses = self.trainer.strategy.reduce(self.val_code_uses.clone(), reduce_op="sum")
        perplexity, dead = codebook_usage(uses)
        self.log("val/codebook_perplexity", perplexity, rank_zero_only=True)
        self.log("val/codebook_dead", dead, rank_zero_only=True)

    @torch.no_grad()
    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Original, and what comes back: raw and averaged weights, and through the codebook."""
        images = batch["image"]
        with unsharded(self):
            raw = self.reconstruct(images)
        with self.ema.applied(self):
            averaged = self.reconstruct(images)
            quantized = self.vqgan.quantizer(self.vqgan.features(images)).latents
            codes = self.vqgan.decode_features(quantized).clamp(0, 1)
        return {"original": images, "raw": raw, "EMA": averaged, "EMA, quantized": codes}


def rows_of(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C) float32."""
    return features.permute(0, 2, 3, 1).flatten(0, 2).float()
