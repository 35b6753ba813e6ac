"""A number with what it was measured on, and how far it may be off: intervals by bootstrap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
"""Of a mean over images."""
RESAMPLES_OF_SETS = 20
"""Of a distance between sets, each of which takes as long as the distance itself."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric: its value and 95 % interval.

    Args:
        value: the metric.
        low: lower end of the interval; None where there is too little to tell.
        high: its upper end.
        number: of images.
        per_sample: of every image, in their order; empty for a metric of the whole set.
        facts: what else to know of it, such as the reference's size.
    """

    value: float
    low: float | None
    high: float | None
    number: int
    per_sample: Sequence[float] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def mean_score(each: Sequence[float], **facts: Any) -> Score:
    """The mean of a score of each image, with the percentiles of means of resampled images.

    Raises:
        ValueError: if there is no image.
    """
    if not len(each):
        raise ValueError("no image to measure; the data's split is empty")
    values = np.asarray(each, dtype=np.float64)
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
        facts=facts,
    )


def set_score(measure: Callable[[np.ndarray], float], number: int, **facts: Any) -> Score:
    """A metric of a set, with 1.96 standard deviations of its values for resampled sets about it.

    Their deviation alone is taken, and not their percentiles: a resampled set has images twice,
    by which a Frechet distance grows.

    Args:
        measure: indices of images -> the metric of these.
        number: of images.
        facts: to note.
    """
    value = measure(np.arange(number))
    rng = np.random.default_rng(0)
    drawn = [measure(rng.integers(number, size=number)) for _ in range(RESAMPLES_OF_SETS)]
    half = 1.96 * float(np.std(drawn, ddof=1))
    return Score(value=value, low=value - half, high=value + half, number=number, facts=facts)
