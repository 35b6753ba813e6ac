"""The loss of a denoiser by bands of t: where it learns, and where it fails."""

import torch
from torch import Tensor

NUM_BINS = 10


class TimestepBins:
    """Means of the losses of samples whose t lies in the same tenth of [0, 1]."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, NUM_BINS)

    @torch.no_grad()
    def add(self, t: Tensor, losses: Tensor) -> None:
        """Take in (B,) losses at (B,) times; those that are not finite are left out."""
        self.sums = self.sums.to(losses.device)
        band = (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        finite = losses.isfinite()
        self.sums[0].index_add_(0, band, losses.float().where(finite, 0.0))
        self.sums[1].index_add_(0, band, finite.float())

    def pop(self) -> Tensor:
        """(2, BANDS) sums and numbers of losses since the last time, to be added up over processes.

        They start at 0.
        """
        sums = self.sums.clone()
        self.sums.zero_()
        return sums
