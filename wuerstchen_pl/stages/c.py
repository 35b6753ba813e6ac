"""Stage C: training the text-conditional prior (arXiv 2306.00637, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.diffusion.latent_scaling import LatentScaling
from wuerstchen_pl.diffusion.objective import P2Form
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.compressor_only import CompressorOnly
from wuerstchen_pl.stages.decoder_stage import DecoderStage
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenPrecision
from wuerstchen_pl.stages.preservation import PriorPreservation
from wuerstchen_pl.stages.stage import OptimizerFactory
from wuerstchen_pl.stages.text_conditional import TextConditionalStage


class StageC(TextConditionalStage):
    """Noise prediction in the semantic latents of a trained Stage B, conditioned on text.

    Args:
        stage_b: the trained Stage B, with its compressor and Stage A; frozen. With its compressor
            only, Stage C trains, but does not draw.
        prior: the denoiser.
        semantic_shift: the prior works on (s + shift) / scale, with s from the compressor.
        semantic_scale: see ``semantic_shift``.

    The other arguments are those of ``TextConditionalStage``.
    """

    name: ClassVar[Literal["c"]] = "c"
    stage_b: DecoderStage | CompressorOnly

    def __init__(
        self,
        *,
        stage_b: DecoderStage | CompressorOnly,
        prior: Prior,
        text_encoder: TextEncoder,
        adapter: Adapter | None = None,
        text_adapter: Adapter | None = None,
        words: NewWords | None = None,
        preservation: PriorPreservation | None = None,
        train_text_encoder: bool = False,
        text_encoder_lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema: EMA | None = None,
        p2: P2Form = "code",
        caption_drop_prob: float = 0.05,
        semantic_shift: float = 0.0,
        semantic_scale: float = 1.0,
        frozen_precision: FrozenPrecision = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(
            prior=prior,
            text_encoder=text_encoder,
            adapter=adapter,
            text_adapter=text_adapter,
            words=words,
            preservation=preservation,
            train_text_encoder=train_text_encoder,
            text_encoder_lr=text_encoder_lr,
            latent_channels=stage_b.latent_channels,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            ema=ema,
            p2=p2,
            caption_drop_prob=caption_drop_prob,
            scaling=LatentScaling(shift=semantic_shift, scale=semantic_scale),
            frozen_precision=frozen_precision,
            seed=seed,
        )
        self.frozen.register("stage_b", stage_b)

    @property
    def can_draw(self) -> bool:
        """Whether Stages B and A are present, which turn semantic latents into images."""
        return isinstance(self.stage_b, DecoderStage)

    @property
    def drawing_stage_b(self) -> DecoderStage:
        """Stage B.

        Raises:
            ValueError: if only its compressor is present.
        """
        if not isinstance(self.stage_b, DecoderStage):
            raise ValueError(
                "this Stage C was trained without Stages B and A; use it as prior= of a model that "
                "has them, such as model=warp-ai/wuerstchen"
            )
        return self.stage_b

    @property
    def size_multiple(self) -> int:
        """1: compressor and prior take any size, and Stage B generates any size for grids."""
        return 1

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image of (height, width) pixels."""
        return self.stage_b.semantic_size(height, width)

    @property
    def encoding(self) -> SemanticCompressor:
        """Stage B's compressor."""
        return self.stage_b.encoding

    @property
    def resolution_multiple(self) -> float:
        """Pixels per semantic position."""
        return self.stage_b.compressor.resolution_multiple

    def encode_semantic(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) in the compressor's scale."""
        return self.stage_b.encode(images)

    def decode_semantic(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str],
    ) -> Tensor:
        """(B, S, h, w) in the compressor's scale -> (B, 3, *size) in [0, 1], by Stages B and A.

        Raises:
            ValueError: if there is no Stage B; see ``can_draw``.
        """
        return self.drawing_stage_b.decode(semantic, size=size, seeds=seeds, captions=captions)
