"""Stage B without its denoiser, as Stage C needs it to train."""

from typing import ClassVar

from torch import Tensor

from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.stages.stage import Stage


class CompressorOnly(Stage):
    """The frozen compressor of a Stage B whose denoiser is missing: it encodes, but cannot draw.

    Args:
        compressor: images -> semantic latents.
    """

    name: ClassVar[str] = "compressor"

    def __init__(self, *, compressor: SemanticCompressor) -> None:
        super().__init__(optimizer=None, lr_schedule=None, ema=None, seed=0)
        self.compressor = compressor

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image of (height, width) pixels."""
        return self.compressor.latent_size(height, width)

    @property
    def latent_channels(self) -> int:
        """Channels of the semantic latents."""
        return self.compressor.latent_channels

    @property
    def encoding(self) -> SemanticCompressor:
        """The network that ``encode`` runs."""
        return self.compressor

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) semantic latents."""
        return self.compressor(images)
