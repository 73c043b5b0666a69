"""Intervals hold what they promise: published values, and coverage counted."""

import numpy
import pytest

from lite_orpo.evaluation.intervals import (
    Estimate,
    paired_difference,
    percentiles,
    resampled_ratios,
    share,
    weighted_sum,
)


def outcomes(right: int, count: int):
    return numpy.array([1.0] * right + [0.0] * (count - right))


@pytest.mark.parametrize(
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, count, low, high):
    found = share(outcomes(right, count))
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_a_share_of_one_keeps_an_interval_with_width():
    found = share(outcomes(20, 20))
    assert found.value == found.high == 1 and 0.8 < found.low < 0.9


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def test_the_paired_difference_covers_the_truth_in_95_of_100():
    random = numpy.random.default_rng(0)
    hits = 0
    for _ in range(1500):
        kind = random.choice(4, 60, p=[0.5, 0.2, 0.1, 0.2])  # both, only first, only second, none
        first, second = (kind <= 1) * 1.0, ((kind == 0) | (kind == 2)) * 1.0
        hits += covers(paired_difference(first, second), 0.1)
    assert 0.935 < hits / 1500 < 0.98


def test_pairing_narrows_the_difference_of_models_that_agree():
    first = outcomes(60, 100)
    second = first.copy()
    second[:5] = 0
    alike = paired_difference(first, second)
    unlike = paired_difference(first, numpy.roll(second, 50))
    assert alike.high - alike.low < 0.5 * (unlike.high - unlike.low)


def test_the_weighted_sum_covers_the_truth_in_95_of_100():
    random = numpy.random.default_rng(1)
    hits = 0
    for _ in range(1500):
        parts = [(random.random(n) < p) * 1.0 for n, p in ((90, 0.95), (12, 0.6))]
        hits += covers(weighted_sum((0.5, share(part)) for part in parts), 0.775)
    assert 0.93 < hits / 1500 < 0.985


def test_resampled_means_cover_the_truth_in_95_of_100():
    random = numpy.random.default_rng(2)
    hits = 0
    for seed in range(300):
        values = random.normal(2.0, 1.0, (60, 1))
        draws = resampled_ratios(values, numpy.ones_like(values), seed=seed, resamples=400)
        hits += covers(percentiles(float(values.mean()), draws[:, 0]), 2.0)
    assert 0.90 < hits / 300 < 0.985


def test_the_same_seed_draws_the_same_and_blocks_change_nothing(monkeypatch):
    values = numpy.random.default_rng(3).normal(size=(50, 2))
    ones = numpy.ones_like(values)
    whole = resampled_ratios(values, ones, seed=4, resamples=100)
    monkeypatch.setattr("lite_orpo.evaluation.intervals._DRAWS_AT_ONCE", 700)
    assert numpy.array_equal(whole, resampled_ratios(values, ones, seed=4, resamples=100))
    assert not numpy.array_equal(whole, resampled_ratios(values, ones, seed=5, resamples=100))


def test_columns_share_their_draws():
    values = numpy.random.default_rng(5).normal(size=(40, 1))
    both = numpy.concatenate([values, values + 3.0], axis=1)
    draws = resampled_ratios(both, numpy.ones_like(both), resamples=50)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(3.0)
