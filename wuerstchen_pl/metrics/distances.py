"""How far two sets of pictures are apart, by their features; torchmetrics' own computations.

It takes features where it is told that pictures are features already.
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

SUBSET_SIZE = 1000
SUBSETS = 100


class _Given(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetTo:
    """Frechet distance to a set, both taken as normal (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        reference: (M, D) features.
    """

    def __init__(self, reference: Tensor) -> None:
        given = _Given(reference.shape[1])
        self.metric = FrechetInceptionDistance(feature=given, reset_real_features=False)
        self.metric.update(reference.double(), real=True)

    def __call__(self, ours: Tensor) -> float:
        """(N, D) features -> the distance."""
        self.metric.reset()
        self.metric.update(ours.double(), real=False)
        return float(self.metric.compute())


def check_enough(name: str, ours: Tensor, reference: Tensor) -> None:
    """Refuse sets whose covariance has no full rank: their Frechet distance says little.

    Raises:
        ValueError: naming both numbers.
    """
    fewest, size = min(len(ours), len(reference)), ours.shape[1]
    if fewest <= size:
        raise ValueError(
            f"metric={name} needs more than {size} pictures on both sides, and there are "
            f"{len(ours)} and {len(reference)}; give more, or use metric=[kid]"
        )


def kernel(ours: Tensor, reference: Tensor, *, subset_size: int = SUBSET_SIZE) -> float:
    """Squared maximum mean discrepancy, cubic kernel (Binkowski et al. 2018, arXiv 1801.01401).

    The mean of 100 random subsets of each side, always the same; of one, if it is the whole set.

    Args:
        ours: (N, D) features.
        reference: (M, D).
        subset_size: pictures of a subset, at most as many as there are.
    """
    size = min(subset_size, len(ours), len(reference))
    subsets = 1 if size == len(ours) == len(reference) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")  # as they are
        metric = KernelInceptionDistance(
            feature=_Given(ours.shape[1]), subsets=subsets, subset_size=size
        )
    metric.update(reference.double(), real=True)
    metric.update(ours.double(), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, *, splits: int = 10) -> float:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498), the mean of so many splits.

    Args:
        logits: (N, C) of a classifier.
        splits: into which the pictures are dealt, always in the same way; at most N.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=min(splits, len(logits)))
    metric.update(logits.double())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return float(metric.compute()[0])
