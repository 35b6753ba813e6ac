"""The nearest matrix of low rank, as a LoRA: a truncated SVD (Eckart and Young 1936)."""

from typing import NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.adapters.weights import LowRank


class RankLimit(NamedTuple):
    """How many singular values are kept: as many as both allow.

    Attributes:
        rank: at most this many; None is any number.
        share: the fewest whose root of the sum of squares is at least this share of that of all,
            which is the Frobenius norm; None is all.
    """

    rank: int | None
    share: float | None

    def check(self) -> None:
        """Refuse limits that are out of range, or do not limit anything.

        Raises:
            ValueError: naming the key.
        """
        if self.rank is None and self.share is None:
            raise ValueError("rank and share are null; set one of them")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} is out of range; use 1 or more, or null")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is out of range; use 0 < share <= 1, or null")

    def apply(self, singular: Tensor) -> int:
        """The number of values that are kept, 1 or more.

        Args:
            singular: the singular values of a matrix, largest first.
        """
        rank = len(singular) if self.rank is None else min(self.rank, len(singular))
        if self.share is None:
            return rank
        norms = singular.double().square().cumsum(0).sqrt()
        return min(rank, 1 + int((norms < self.share * norms[-1]).sum()))


@torch.no_grad()
def truncate(change: Tensor, limit: RankLimit) -> LowRank:
    """The LoRA of a rank within the limit that is nearest to a change of a weight.

    Its error has as Frobenius norm the root of the sum of the squares of the singular values that
    are not kept.

    Args:
        change: (out, in).
        limit: of the rank.
    """
    u, singular, vh = torch.linalg.svd(change.float(), full_matrices=False)
    return _from_svd(u, singular, vh, limit)


@torch.no_grad()
def resize(layer: LowRank, limit: RankLimit) -> LowRank:
    """The LoRA of a rank within the limit that is nearest to another one.

    The SVD is that of an (r, r) matrix, by the QR decompositions of the factors.

    Args:
        layer: without magnitudes.
        limit: of the rank; the layer itself is returned if it is within it.
    """
    q_up, r_up = torch.linalg.qr(layer.up)
    q_down, r_down = torch.linalg.qr(layer.down.T)
    u, singular, vh = torch.linalg.svd(r_up @ r_down.T)
    if limit.apply(singular) >= layer.rank:
        return layer
    return _from_svd(q_up @ u, singular, vh @ q_down.T, limit)


def _from_svd(u: Tensor, singular: Tensor, vh: Tensor, limit: RankLimit) -> LowRank:
    rank = limit.apply(singular)
    root = singular[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).contiguous(), u[:, :rank] * root)
