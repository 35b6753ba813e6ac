"""The loss of a denoiser, binned by the diffusion time t."""

import torch
from torch import Tensor

NUM_BINS = 10


class TimestepBins:
    """Sums and counts of per-sample losses in ``NUM_BINS`` equal bins of t in [0, 1]."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, NUM_BINS)

    @torch.no_grad()
    def add(self, t: Tensor, losses: Tensor) -> None:
        """Add (B,) losses at (B,) times; non-finite losses are ignored."""
        self.sums = self.sums.to(losses.device)
        bins = (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        finite = losses.isfinite()
        self.sums[0].index_add_(0, bins, losses.float().where(finite, 0.0))
        self.sums[1].index_add_(0, bins, finite.float())

    def pop(self) -> Tensor:
        """Reset this process's (2, NUM_BINS) sums and counts, and return them."""
        sums = self.sums.clone()
        self.sums.zero_()
        return sums
