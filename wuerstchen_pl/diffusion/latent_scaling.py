"""Scaling between the compressor's latents and Stage C's."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """Stage C's latents are (s + shift) / scale, with s from the compressor.

    The published v2 prior uses shift 1 and scale 42; the paper and v1 do not rescale.
    """

    shift: float = 0.0
    scale: float = 1.0

    def normalize(self, semantic: Tensor) -> Tensor:
        """Semantic latents in the compressor's scale -> in Stage C's, of the same shape."""
        return (semantic + self.shift) / self.scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents in Stage C's scale -> in the compressor's, of the same shape."""
        return latents * self.scale - self.shift
