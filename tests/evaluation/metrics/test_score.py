"""Means, intervals and win rates whose answer is known."""

import math

import numpy as np
import pytest

from wuerstchen_pl.evaluation.metrics.preference import pairwise_wins
from wuerstchen_pl.evaluation.metrics.score import mean_score, proportion_score, set_score


def test_the_interval_of_a_mean_is_that_of_its_error() -> None:
    """Of n numbers of deviation s, 1.96 s / sqrt(n) to either side."""
    values = np.random.default_rng(1).standard_normal(400)
    found = mean_score(list(values))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (found.number, len(found.per_sample)) == (400, 400)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = mean_score(list(rng.standard_normal(50)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.88 < held / 200 < 0.99


def test_a_single_image_has_no_interval() -> None:
    found = mean_score([3.0])
    assert (found.value, found.low, found.high) == (3.0, None, None)


def test_the_interval_of_a_sets_metric_is_the_spread_of_resampled_ones() -> None:
    values = np.random.default_rng(3).standard_normal(400)
    found = set_score(lambda chosen: float(values[chosen].mean()), len(values), reference=7)
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value - found.low == pytest.approx(half, rel=0.5)
    assert found.facts == {"reference": 7}


def test_a_folder_wins_half_the_time_against_itself() -> None:
    scores = list(np.random.default_rng(0).standard_normal(9))
    assert pairwise_wins(scores, scores) == [0.5] * 9
    assert mean_score(pairwise_wins(scores, scores)).value == 0.5


def test_wins_and_losses_are_counted_for_each_prompt() -> None:
    assert pairwise_wins([1, 2, 3], [2, 2, 2]) == [0, 0.5, 1]
    with pytest.raises(ValueError, match="2 scores and 1 are not of the same prompts"):
        pairwise_wins([1, 2], [1])


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        mean_score([])


def test_a_proportion_has_wilsons_interval() -> None:
    """p = 1: n / (n + z^2); p = 1/2 of 4: 1/2 -+ z / (2 sqrt(4 + z^2)) (Wilson 1927)."""
    all_right = proportion_score([1.0] * 128)
    assert (all_right.value, all_right.high) == pytest.approx((1, 1))
    assert all_right.low == pytest.approx(128 / (128 + 1.96**2))
    half = proportion_score([0.0, 1.0, 0.5, 0.5])
    width = 1.96 / (2 * math.sqrt(4 + 1.96**2))
    assert (half.low, half.high) == pytest.approx((0.5 - width, 0.5 + width))
    with pytest.raises(ValueError, match="no image to measure"):
        proportion_score([])


def test_an_interval_ends_at_the_least_possible_value() -> None:
    """A distance cannot be negative, so neither can the end of its interval."""
    values = np.random.default_rng(4).standard_normal(10)
    distance = set_score(lambda chosen: abs(float(values[chosen].mean())), len(values), least=0.0)
    assert distance.low == 0
    assert distance.high is not None
    assert distance.high > distance.value
