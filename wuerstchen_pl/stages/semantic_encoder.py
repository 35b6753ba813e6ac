"""What Stage C needs of a Stage B in any case: its compressor."""

from torch import Tensor

from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.stages.stage import Stage


class SemanticEncoder(Stage):
    """Base of the stages that have a compressor: images -> semantic latents."""

    compressor: SemanticCompressor

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image of (height, width) pixels."""
        return self.compressor.latent_size(height, width)

    @property
    def latent_channels(self) -> int:
        """Channels of the semantic latents."""
        return self.compressor.latent_channels

    @property
    def encoding(self) -> SemanticCompressor:
        """The network that ``encode`` runs; caches are keyed by its fingerprint."""
        return self.compressor

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, h, w) semantic latents."""
        return self.compressor(images)
