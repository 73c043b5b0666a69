"""95 % intervals: of shares, of their paired differences and weighted sums, and of means.

Shares have score intervals (Wilson), which are right for few pairs and near 0 and 1, where
resampling gives an interval without width. Differences and weighted sums of shares are built from
those (Newcombe 1998, Statistics in Medicine 17:2635; Zou and Donner 2008, the same 27:1693). Means
and ratios have percentiles of resamples. Pairs count as independent of each other.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]

Z = 1.959963984540054  # 95 %
_DRAWS_AT_ONCE = 4_000_000  # resampled pairs in memory together: some 100 MB


class Estimate(NamedTuple):
    """A figure and its 95 % interval; no interval (None) where there are too few pairs for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def share(outcomes: Array) -> Estimate:
    """Mean of outcomes between 0 and 1, with Wilson's score interval.

    Args:
        outcomes: [N], N at least 1; 1 right, 0 wrong, 0.5 undecided.
    """
    count, mean = len(outcomes), float(outcomes.mean())
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    spread = math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    half = Z * spread / (1 + Z**2 / count)
    # Rounding may put an end past the share itself, where that is 0 or 1.
    return Estimate(mean, min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half)))


def paired_difference(first: Array, second: Array) -> Estimate:
    """Difference of two shares over the same pairs, `first` minus `second` (Newcombe's method 8).

    Args:
        first: [N] outcomes, as in `share`.
        second: [N].
    """
    a, b = share(first), share(second)
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None
    together = _correlation(first, second)
    low = _distance(a.value - a.low, b.high - b.value, together)
    high = _distance(a.high - a.value, b.value - b.low, together)
    value = a.value - b.value
    return Estimate(value, max(-1.0, value - low), min(1.0, value + high))


def weighted_sum(parts: Iterable[tuple[float, Estimate]]) -> Estimate:
    """Sum of independent estimates, each times its weight (at least 0), by Zou and Donner."""
    value = low = high = 0.0
    for weight, part in parts:
        assert part.low is not None and part.high is not None
        value += weight * part.value
        low += (weight * (part.value - part.low)) ** 2
        high += (weight * (part.high - part.value)) ** 2
    return Estimate(value, value - math.sqrt(low), value + math.sqrt(high))


def resampled_ratios(
    numerators: Array, denominators: Array, *, seed: int = 0, resamples: int = 2000
) -> Array:
    """Ratios of sums over pairs that are drawn with replacement; the same draws for each column.

    Args:
        numerators: [N, K].
        denominators: [N, K], positive; ones for a plain mean.
        seed: of the draws.
        resamples: R.

    Returns:
        [R, K]. Columns of one call are paired: their differences are resamples of a difference.
    """
    count, columns = numerators.shape
    both = numpy.concatenate([numerators, denominators], axis=1)
    random = numpy.random.default_rng(seed)
    at_once = max(1, min(resamples, _DRAWS_AT_ONCE // max(count, 1)))
    found = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = random.integers(0, count, (rows, count))
        drawn += (numpy.arange(rows) * count)[:, None]
        times = numpy.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums = times.astype(numpy.float64) @ both
        found.append(sums[:, :columns] / sums[:, columns:])
    return numpy.concatenate(found)


def percentiles(value: float, draws: Array) -> Estimate:
    """The figure with the middle 95 % of its resamples [R]."""
    low, high = numpy.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _correlation(first: Array, second: Array) -> float:
    deviations = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale > 0 else 0.0


def _distance(first: float, second: float, together: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * together * first * second + second**2))
