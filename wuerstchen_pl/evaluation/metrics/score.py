"""Metric values with sample sizes and 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Z_95 = 1.96
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 1000
"""Bootstrap samples for the mean of a per-image score."""
RESAMPLES_OF_SETS = 20
"""Bootstrap samples for a set metric; each takes as long as the metric itself."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The value of a metric and its 95 % confidence interval.

    Args:
        value: the metric.
        low: lower end of the interval; None if there are too few samples for an interval.
        high: upper end of the interval.
        number: number of images.
        per_sample: values of the images, in their order; empty for a metric of the whole set.
        metadata: what else to report, such as the reference's size.
    """

    value: float
    low: float | None
    high: float | None
    number: int
    per_sample: Sequence[float] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def format_interval(score: Score) -> str:
    """``0.9 to 1.1``; empty without an interval."""
    return "" if score.low is None else f"{score.low:.4g} to {score.high:.4g}"


def mean_score(per_sample: Sequence[float], **metadata: Any) -> Score:
    """The mean of a per-image score, with a percentile bootstrap interval.

    Raises:
        ValueError: if there are no images.
    """
    if not len(per_sample):
        raise ValueError("there are no images to measure; use a data split that is not empty")
    values = np.asarray(per_sample, dtype=np.float64)
    rng, number = np.random.default_rng(0), len(values)
    means = [values[rng.integers(number, size=number)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    several = len(values) > 1
    return Score(
        value=float(values.mean()),
        low=float(low) if several else None,
        high=float(high) if several else None,
        number=len(values),
        per_sample=[float(value) for value in values],
        metadata=metadata,
    )


def proportion_score(per_sample: Sequence[float], **metadata: Any) -> Score:
    """A proportion with its Wilson score interval (Wilson 1927, JASA 22).

    A bootstrap gives [1, 1] for 128 successes of 128; Wilson's interval is [0.971, 1].

    Args:
        per_sample: 1 for a success, 0 for a failure, 1/2 for a tie.
        metadata: what else to report.

    Raises:
        ValueError: if there are no samples.
    """
    if not len(per_sample):
        raise ValueError("there are no images to measure; use a data split that is not empty")
    number, share = len(per_sample), float(np.mean(per_sample))
    scale = 1 + Z_95**2 / number
    center = (share + Z_95**2 / (2 * number)) / scale
    variance = share * (1 - share) / number + Z_95**2 / (4 * number**2)
    half = Z_95 * math.sqrt(variance) / scale
    return Score(
        value=share,
        low=max(0.0, center - half),
        high=min(1.0, center + half),
        number=number,
        per_sample=[float(value) for value in per_sample],
        metadata=metadata,
    )


def set_score(
    measure: Callable[[np.ndarray], float],
    number: int,
    *,
    min_value: float = -math.inf,
    **metadata: Any,
) -> Score:
    """A set metric +- 1.96 standard deviations over bootstrap samples of the set.

    The deviation is used instead of percentiles, because a bootstrap sample contains duplicates,
    which increase a Frechet distance.

    Args:
        measure: indices of images -> the metric of these images.
        number: number of images.
        min_value: the smallest possible value of the metric; the interval is clipped to it.
        metadata: what else to report.
    """
    value = measure(np.arange(number))
    rng = np.random.default_rng(0)
    resampled = [measure(rng.integers(number, size=number)) for _ in range(RESAMPLES_OF_SETS)]
    half = Z_95 * float(np.std(resampled, ddof=1))
    low = max(min_value, value - half)
    return Score(value=value, low=low, high=value + half, number=number, metadata=metadata)
