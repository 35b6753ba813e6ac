"""The paper's baseline: a latent diffusion model in Stage A's latents (section 4).

Objective, text conditioning, EMA and sampling are those of Stage C; only the compression differs:
the latents are Stage A's, which are as large as those that Stage B generates.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from wuerstchen_pl.diffusion.latent_scaling import LatentScaling
from wuerstchen_pl.diffusion.objective import P2Form
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.stage import OptimizerFactory
from wuerstchen_pl.stages.text_conditional import TextConditionalStage


class StageLDM(TextConditionalStage):
    """Noise prediction in the latents of a trained Stage A, conditioned on text.

    Args:
        stage_a: the trained Stage A; frozen.
        prior: the denoiser.

    The other arguments are those of ``TextConditionalStage``.
    """

    name: ClassVar[Literal["ldm"]] = "ldm"
    stage_a: StageA
    prior: UNet

    def __init__(
        self,
        *,
        stage_a: StageA,
        prior: UNet,
        text_encoder: TextEncoder,
        train_text_encoder: bool = False,
        text_encoder_lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        p2: P2Form = "code",
        caption_drop_prob: float = 0.05,
        frozen_precision: FrozenPrecision = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(
            prior=prior,
            text_encoder=text_encoder,
            adapter=None,
            text_adapter=None,
            words=None,
            preservation=None,
            train_text_encoder=train_text_encoder,
            text_encoder_lr=text_encoder_lr,
            latent_channels=stage_a.latent_channels,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            ema=ema,
            p2=p2,
            caption_drop_prob=caption_drop_prob,
            scaling=LatentScaling(),
            frozen_precision=frozen_precision,
            seed=seed,
        )
        self.frozen.register("stage_a", stage_a)

    @property
    def size_multiple(self) -> int:
        """Stage A's factor times the denoiser's."""
        return self.stage_a.size_multiple * self.prior.size_multiple

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Positions (h, w) of the latents of an image of (height, width) pixels."""
        factor = self.stage_a.vqgan.factor
        return height // factor, width // factor

    @property
    def encoding(self) -> VQGAN:
        """Stage A's network."""
        return self.stage_a.encoding

    @property
    def resolution_multiple(self) -> float:
        """Pixels per position of the latents."""
        return self.stage_a.vqgan.factor

    def encode_semantic(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/f, W/f) latents of unit variance."""
        return self.stage_a.encode(images)

    def decode_semantic(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str],
    ) -> Tensor:
        """(B, C, h, w) latents -> (B, 3, *size) in [0, 1], by Stage A."""
        return self.stage_a.decode(semantic)
