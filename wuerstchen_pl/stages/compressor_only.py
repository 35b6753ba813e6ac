"""Stage B without its denoiser, as Stage C needs it to train."""

from typing import ClassVar

from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.stages.semantic_encoder import SemanticEncoder


class CompressorOnly(SemanticEncoder):
    """The frozen compressor of a Stage B whose denoiser is missing: it encodes, but cannot draw.

    Args:
        compressor: images -> semantic latents.
    """

    name: ClassVar[str] = "compressor"

    def __init__(self, *, compressor: SemanticCompressor) -> None:
        super().__init__(optimizer=None, lr_schedule=None, ema=None, seed=0)
        self.compressor = compressor
