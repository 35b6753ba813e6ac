"""How far two sets of images are apart, by their features; torchmetrics' own computations.

Features can be passed in place of images.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

SUBSET_SIZE = 1000
SUBSETS = 100
ALONE: dict[str, Any] = {"sync_on_compute": False}
"""One process measures; torchmetrics would wait for the others."""


class _Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Frechet distance to a set, both taken as normal (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        reference: (M, D) features.
    """

    def __init__(self, reference: Tensor) -> None:
        given = _Identity(reference.shape[1])
        self.metric = FrechetInceptionDistance(feature=given, reset_real_features=False, **ALONE)
        self.metric.update(reference.double(), real=True)

    def __call__(self, ours: Tensor) -> float:
        """(N, D) features -> the distance."""
        self.metric.reset()
        self.metric.update(ours.double(), real=False)
        return float(self.metric.compute())


def check_enough(name: str, width: int, *numbers: int) -> None:
    """Refuse sets that are too small for a distance.

    A covariance of fewer images than features has no full rank, and the Frechet distance then
    says little; a kernel's takes two images.

    Args:
        name: ``fid``, ``rfid`` or ``kid``.
        width: number of features.
        numbers: of images, of each side that is known.

    Raises:
        ValueError: naming the numbers.
    """
    needed = 2 if name == "kid" else width + 1
    if min(numbers) < needed:
        instead = "" if name == "kid" else ", or use metric=[kid]"
        counts = " and ".join(map(str, numbers))
        raise ValueError(
            f"metric={name} needs at least {needed} images on both sides, and there are {counts}; "
            f"give more{instead}"
        )


def kernel_distance(ours: Tensor, reference: Tensor, *, subset_size: int = SUBSET_SIZE) -> float:
    """Squared maximum mean discrepancy, cubic kernel (Binkowski et al. 2018, arXiv 1801.01401).

    The mean of 100 random subsets of each side, always the same; of one, if it is the whole set.

    Args:
        ours: (N, D) features.
        reference: (M, D).
        subset_size: images of a subset, at most as many as there are.
    """
    size = min(subset_size, len(ours), len(reference))
    subsets = 1 if size == len(ours) == len(reference) else SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")  # as they are
        metric = KernelInceptionDistance(
            feature=_Identity(ours.shape[1]), subsets=subsets, subset_size=size, **ALONE
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
        splits: into which the images are dealt, always in the same way; at most N.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        metric = InceptionScore(
            feature=_Identity(logits.shape[1]), splits=min(splits, len(logits)), **ALONE
        )
    metric.update(logits.double())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return float(metric.compute()[0])
