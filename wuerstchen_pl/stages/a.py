"""Stage A: training the VQGAN (arXiv 2306.00637, section 3.1 and appendix E)."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.batch import Batch, num_unique_samples
from wuerstchen_pl.distributed.counters import sum_counts
from wuerstchen_pl.distributed.fsdp2 import index_copy, unsharded
from wuerstchen_pl.models.discriminator import Discriminator
from wuerstchen_pl.models.vqgan import VQGAN, codebook_usage
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import OptimizerFactory, Stage


class StageA(Stage):
    """Reconstruction, perceptual, adversarial and codebook losses.

    The VQGAN and the discriminator are two parameter groups of one optimizer. AdamW updates each
    parameter independently, so this equals two optimizers, while EMA, clipping, accumulation,
    sharding and checkpoints work as in the other stages.

    Args:
        vqgan: encoder, codebook and decoder.
        discriminator: trained from the first step on, whether or not its loss is applied; None for
            a Stage A that is not trained.
        perceptual: two batches of images -> (B,) distances; frozen. None omits this loss.
        optimizer: builds an optimizer over both parameter groups.
        lr_schedule: step -> factor on the learning rate.
        ema: moving average of the trainable weights.
        mse_weight: weight of the squared error (paper: 1).
        perceptual_weight: weight of the perceptual distance (paper: 0.1).
        adversarial_weight: weight of the adversarial loss (paper: 0.01).
        adversarial_start_step: first step that applies the adversarial loss (paper: 10,000); below
            1, a share of the run.
        commitment_weight: weight of the commitment loss (code: 0.25).
        quantize_drop_prob: probability that a step skips quantization (paper: 0.1).
        codebook_restart_every_steps: steps between two restarts, which replace unused codes with
            latents of the current batch.
        seed: seed of the random numbers of training.
    """

    name = "a"
    vqgan: VQGAN
    discriminator: Discriminator
    perceptual: nn.Module | None
    code_uses: Tensor
    val_code_uses: Tensor

    TRAINING_ONLY = (*Stage.TRAINING_ONLY, "perceptual")
    SEPARATE_LOSSES = True
    GATHER_BFLOAT16 = False  # blocks multiply their weights by gates before autocast casts them

    def __init__(
        self,
        *,
        vqgan: VQGAN,
        discriminator: Discriminator | None = None,
        perceptual: nn.Module | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        mse_weight: float = 1.0,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.01,
        adversarial_start_step: float = 10_000,
        commitment_weight: float = 0.25,
        quantize_drop_prob: float = 0.1,
        codebook_restart_every_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_schedule=lr_schedule, ema=ema, seed=seed)
        self.vqgan = vqgan
        if discriminator is not None:
            self.discriminator = discriminator
        self.frozen.register("perceptual", perceptual)
        self.mse_weight, self.perceptual_weight = mse_weight, perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start_step = adversarial_start_step
        self.commitment_weight = commitment_weight
        self.quantize_drop_prob = quantize_drop_prob
        self.codebook_restart_every_steps = codebook_restart_every_steps
        codes = vqgan.quantizer.codebook.num_embeddings
        # Uses of each code since the last restart, and since validation started.
        self.register_buffer("code_uses", torch.zeros(codes))
        self.register_buffer("val_code_uses", torch.zeros(codes), persistent=False)

    @property
    def size_multiple(self) -> int:
        """2^levels: pixels per latent position along a side."""
        return self.vqgan.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vqgan.latent_channels

    # Interface for Stage B

    @property
    def encoding(self) -> VQGAN:
        """The network that ``encode`` runs; caches are keyed by its fingerprint."""
        return self.vqgan

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/f, W/f) unquantized latents of unit variance."""
        return self.vqgan.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents -> (B, 3, h f, w f) in [0, 1]."""
        return self.vqgan.decode(latents).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same shape, through the unquantized latents of Stage B."""
        return self.decode(self.encode(images))

    # Losses

    def generator_loss(
        self, images: Tensor, *, quantize: bool, adversarial: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of the VQGAN.

        Args:
            images: (B, 3, H, W) in [0, 1].
            quantize: False decodes the unquantized latents.
            adversarial: whether to add the adversarial loss.

        Returns:
            The loss, the reconstruction, and by name the loss terms, ``indices`` and ``features``.
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
            # in bfloat16, the error of VGG16's gradient would be a fifth of its norm
            with self.frozen.computing(self.perceptual, self.device):
                terms["perceptual"] = self.perceptual(decoded.float(), images).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if adversarial:
            terms["adversarial"] = F.softplus(-self.discriminator.logits(decoded)).mean()
            loss = loss + self.adversarial_weight * terms["adversarial"]
        return loss, decoded, {**terms, "indices": quantized.indices, "features": features}

    def discriminator_loss(self, images: Tensor, decoded: Tensor) -> Tensor:
        """(-log D(real) - log(1 - D(fake))) / 2, averaged over patches."""
        real = F.softplus(-self.discriminator.logits(images)).mean()
        fake = F.softplus(self.discriminator.logits(decoded.detach())).mean()
        return 0.5 * (real + fake)

    # Training

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for the VQGAN, one for the discriminator."""
        if not hasattr(self, "discriminator"):
            raise ValueError("stage.discriminator is missing; set it to train Stage A")
        parts = {"vqgan": self.vqgan, "discriminator": self.discriminator}
        return [{"params": list(part.parameters()), "name": name} for name, part in parts.items()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of both losses, each with gradients for its own network only."""
        images = batch["image"]
        rng = self.batch_rng(len(images), batch_idx)
        self.discriminator.requires_grad_(False)
        loss, decoded, terms = self.generator_loss(
            images,
            quantize=rng.batch_uniform() >= self.quantize_drop_prob,
            adversarial=self.global_step >= self._adversarial_start(),
        )
        self.discriminator.requires_grad_(True)
        discriminator_loss = self.discriminator_loss(images, decoded)
        self._count_codes(terms.pop("indices"))
        self._latents = rows_of(terms.pop("features").detach())
        self.log_means({"loss": loss, "discriminator": discriminator_loss, **terms})
        return loss + discriminator_loss

    def _adversarial_start(self) -> float:
        """The first step that applies the adversarial loss; none in an unlimited run."""
        start = self.adversarial_start_step
        if 0 < start < 1:
            start *= self.trainer.max_steps if self.trainer.max_steps >= 0 else math.inf
        return start

    def _count_codes(self, indices: Tensor) -> None:
        self.code_uses += sum_counts(count_codes(indices, len(self.code_uses)))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Periodically replace unused codes with current latents, the same on all processes."""
        if step % self.codebook_restart_every_steps:
            return
        dead = (self.code_uses == 0).nonzero().flatten()
        self.log("train/restarted_codes", float(len(dead)))
        self.code_uses.zero_()
        if len(dead) == 0:
            return
        latents = self._gather_rows(self._latents)
        chosen = self.batch_rng(1, 0).randint(len(latents), len(dead)).to(latents.device)
        rows, codebook = latents[chosen], self.vqgan.quantizer.codebook.weight
        index_copy(codebook, dead, rows)
        self.ema.overwrite_rows("vqgan.quantizer.codebook.weight", dead, rows)

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """(N, C) per process -> (world_size min(N), C), the first min(N) rows of each process."""
        num_rows = torch.tensor(len(rows), device=rows.device)
        min_rows = int(self.trainer.strategy.reduce(num_rows, reduce_op="min"))
        return cast(Tensor, self.all_gather(rows[:min_rows])).view(-1, rows.shape[1])

    # Validation, with EMA weights

    def on_validation_epoch_start(self) -> None:
        """Swap in the EMA weights, and reset the code counts."""
        super().on_validation_epoch_start()
        self.val_code_uses.zero_()

    def validate(self, batch: Batch) -> None:
        """Log the loss, and the PSNR of the unquantized reconstruction in dB."""
        images = batch["image"]
        loss, _, terms = self.generator_loss(images, quantize=True, adversarial=False)
        error = F.mse_loss(self.reconstruct(images), images, reduction="none")
        psnr = -10 * error.flatten(1).mean(dim=1).log10().mean()
        if num_unique_samples(batch):
            self.val_code_uses += count_codes(terms["indices"], len(self.val_code_uses))
        metrics = {"val/loss": loss, "val/psnr": psnr}
        self.log_dict(metrics, batch_size=num_unique_samples(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the codebook usage over all processes."""
        super().on_validation_epoch_end()
        uses = self.trainer.strategy.reduce(self.val_code_uses.clone(), reduce_op="sum")
        perplexity, dead = codebook_usage(uses)
        self.log("val/codebook_perplexity", perplexity, rank_zero_only=True)
        self.log("val/codebook_dead", dead, rank_zero_only=True)

    @torch.no_grad()
    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Original; reconstructions: raw weights, EMA weights, EMA weights with quantization."""
        images = batch["image"]
        with unsharded(self):
            raw = self.reconstruct(images)
        with self.ema.applied(self):
            with_ema = self.reconstruct(images)
            quantized = self.vqgan.quantizer(self.vqgan.features(images)).latents
            decoded = self.vqgan.decode_features(quantized).clamp(0, 1)
        return {"original": images, "raw": raw, "EMA": with_ema, "EMA, quantized": decoded}


def rows_of(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C) float32."""
    return features.permute(0, 2, 3, 1).flatten(0, 2).float()


def count_codes(indices: Tensor, codes: int) -> Tensor:
    """Code indices of any shape -> (codes,) float32 number of uses of each.

    Unlike ``torch.bincount``, it does not wait for a GPU to finish.
    """
    uses = torch.zeros(codes, device=indices.device)
    return uses.index_add_(0, indices.flatten(), torch.ones(indices.numel(), device=indices.device))
