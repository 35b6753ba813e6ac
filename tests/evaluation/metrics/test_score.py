"""Means, confidence intervals and win rates on inputs with known results."""

import math

import numpy as np
import pytest

from wuerstchen_pl.evaluation.metrics.preference import pairwise_wins
from wuerstchen_pl.evaluation.metrics.score import mean_score, proportion_score, set_score


def test_the_interval_of_a_mean_equals_the_normal_approximation() -> None:
    """mean +- 1.96 s / sqrt(n) for n values with standard deviation s."""
    values = np.random.default_rng(1).standard_normal(400)
    score = mean_score(list(values))
    assert score.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert score.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (score.number, len(score.per_sample)) == (400, 400)


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        score = mean_score(list(rng.standard_normal(50)))
        assert score.low is not None
        assert score.high is not None
        covered += score.low <= 0 <= score.high
    assert 0.88 < covered / 200 < 0.99


def test_a_single_image_has_no_interval() -> None:
    score = mean_score([3.0])
    assert (score.value, score.low, score.high) == (3.0, None, None)


def test_the_interval_of_a_set_metric_is_the_spread_over_bootstrap_samples() -> None:
    values = np.random.default_rng(3).standard_normal(400)
    score = set_score(lambda indices: float(values[indices].mean()), len(values), reference=7)
    assert score.value == pytest.approx(values.mean())
    assert score.low is not None
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert score.value - score.low == pytest.approx(half, rel=0.5)
    assert score.metadata == {"reference": 7}


def test_a_folder_ties_with_itself() -> None:
    scores = list(np.random.default_rng(0).standard_normal(9))
    assert pairwise_wins(scores, scores) == [0.5] * 9
    assert mean_score(pairwise_wins(scores, scores)).value == 0.5


def test_wins_and_losses_are_counted_per_prompt() -> None:
    assert pairwise_wins([1, 2, 3], [2, 2, 2]) == [0, 0.5, 1]
    with pytest.raises(ValueError, match="2 scores and 1 score do not match"):
        pairwise_wins([1, 2], [1])


def test_an_empty_set_is_rejected() -> None:
    with pytest.raises(ValueError, match="empty"):
        mean_score([])


def test_a_proportion_has_a_wilson_interval() -> None:
    """p = 1: n / (n + z^2); p = 1/2, n = 4: 1/2 -+ z / (2 sqrt(4 + z^2)) (Wilson 1927)."""
    perfect = proportion_score([1.0] * 128)
    assert (perfect.value, perfect.high) == pytest.approx((1, 1))
    assert perfect.low == pytest.approx(128 / (128 + 1.96**2))
    half = proportion_score([0.0, 1.0, 0.5, 0.5])
    width = 1.96 / (2 * math.sqrt(4 + 1.96**2))
    assert (half.low, half.high) == pytest.approx((0.5 - width, 0.5 + width))
    with pytest.raises(ValueError, match="no images to measure"):
        proportion_score([])


def test_an_interval_is_clipped_to_the_smallest_possible_value() -> None:
    """A distance cannot be negative, so its interval is clipped to 0."""
    values = np.random.default_rng(4).standard_normal(10)
    distance = set_score(
        lambda indices: abs(float(values[indices].mean())), len(values), min_value=0.0
    )
    assert distance.low == 0
    assert distance.high is not None
    assert distance.high > distance.value
