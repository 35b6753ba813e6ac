"""The scale in which Stage C works."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """Stage C's latents are (s + shift) / scale of the compressor's s.

    v2's published prior: shift 1, scale 42. The paper's and v1's: the compressor's own scale.
    """

    shift: float = 0.0
    scale: float = 1.0

    def normalize(self, semantic: Tensor) -> Tensor:
        """Semantic latents in the compressor's scale -> in Stage C's, of the same shape."""
        return (semantic + self.shift) / self.scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents in Stage C's scale -> in the compressor's, of the same shape."""
        return latents * self.scale - self.shift
