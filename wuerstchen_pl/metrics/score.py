"""A number with what it was measured on, and how far it may be off: intervals by bootstrap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
"""Of a mean over pictures."""
RESAMPLES_OF_SETS = 20
"""Of a distance between sets, each of which takes as long as the distance itself."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric: its value and 95 % interval.

    Args:
        value: the metric.
        low: lower end of the interval; None where there is too little to tell.
        high: its upper end.
        number: of pictures.
        each: of every picture, in their order; empty for a metric of the whole set.
        facts: what else to know of it, such as the reference's size.
    """

    value: float
    low: float | None
    high: float | None
    number: int
    each: Sequence[float] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def mean(each: Sequence[float], **facts: Any) -> Score:
    """The mean of a score of each picture, with the percentiles of means of resampled pictures.

    Raises:
        ValueError: if there is no picture.
    """
    if not len(each):
        raise ValueError("no picture to measure; the data's split is empty")
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
        each=[float(value) for value in values],
        facts=facts,
    )


def of_set(measure: Callable[[np.ndarray], float], number: int, **facts: Any) -> Score:
    """A metric of a set, with 1.96 standard deviations of its values for resampled sets about it.

    Their deviation alone is taken, and not their percentiles: a resampled set has pictures twice,
    by which a Frechet distance grows.

    Args:
        measure: indices of pictures -> the metric of these.
        number: of pictures.
        facts: to note.
    """
    value = measure(np.arange(number))
    rng = np.random.default_rng(0)
    drawn = [measure(rng.integers(number, size=number)) for _ in range(RESAMPLES_OF_SETS)]
    half = 1.96 * float(np.std(drawn, ddof=1))
    return Score(value=value, low=value - half, high=value + half, number=number, facts=facts)
