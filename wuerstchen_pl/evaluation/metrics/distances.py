"""Distances between sets of images, computed by torchmetrics from precomputed features."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from wuerstchen_pl.plural import plural

SUBSET_SIZE = 1000
SUBSETS = 100
NO_SYNC: dict[str, Any] = {"sync_on_compute": False}
"""Only one process measures; torchmetrics would wait for the other ones."""


class _Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Frechet distance to a reference set (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        reference: (M, D) features.
    """

    def __init__(self, reference: Tensor) -> None:
        features = _Identity(reference.shape[1])
        self.metric = FrechetInceptionDistance(
            feature=features, reset_real_features=False, **NO_SYNC
        )
        self.metric.update(reference.double(), real=True)

    def __call__(self, features: Tensor) -> float:
        """(N, D) features -> the distance."""
        self.metric.reset()
        self.metric.update(features.double(), real=False)
        return float(self.metric.compute())


def check_enough(name: str, width: int, *numbers: int) -> None:
    """Check that sets are large enough for a distance.

    With fewer images than features the covariance is rank-deficient and the Frechet distance is
    not meaningful; the kernel distance needs two images.

    Args:
        name: ``fid``, ``rfid`` or ``kid``.
        width: number of features.
        numbers: number of images in each set whose size is known.

    Raises:
        ValueError: naming the required and the actual numbers.
    """
    needed = 2 if name == "kid" else width + 1
    if min(numbers) < needed:
        instead = "" if name == "kid" else ", or use metric=[kid]"
        counts = " and ".join(map(str, numbers))
        raise ValueError(
            f"metric={name} needs at least {plural(needed, 'image')} in both sets, but there "
            f"are {counts}; use more images{instead}"
        )


def kernel_distance(
    features: Tensor, reference: Tensor, *, subset_size: int = SUBSET_SIZE
) -> float:
    """Squared maximum mean discrepancy, cubic kernel (Binkowski et al. 2018, arXiv 1801.01401).

    The mean over 100 pairs of random subsets with a fixed seed, or over one if it is the whole set.

    Args:
        features: (N, D) features.
        reference: (M, D) features.
        subset_size: number of images in a subset, clipped to the size of the smaller set.
    """
    size = min(subset_size, len(features), len(reference))
    subsets = 1 if size == len(features) == len(reference) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        metric = KernelInceptionDistance(
            feature=_Identity(features.shape[1]), subsets=subsets, subset_size=size, **NO_SYNC
        )
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, *, splits: int = 10) -> float:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498), the mean over splits.

    Args:
        logits: (N, C) classifier logits.
        splits: number of random splits with a fixed seed, clipped to N.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        metric = InceptionScore(
            feature=_Identity(logits.shape[1]), splits=min(splits, len(logits)), **NO_SYNC
        )
    metric.update(logits.double())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return float(metric.compute()[0])
