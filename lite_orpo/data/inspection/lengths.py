"""How long prompts and completions are: exact counts by length, and histograms of them."""

import math
from collections import Counter
from typing import NamedTuple

from .finding import Finding
from .seen_row import SeenRow

_BARS = 30
_EXACT_BELOW = 10_000


class Histogram(NamedTuple):
    """Rows by length; bar i counts lengths from `i * width` on, the last one all above, too."""

    width: int
    counts: tuple[int, ...]


class LengthSummary(NamedTuple):
    """Lengths of one text of the rows."""

    mean: float
    median: int
    p95: int
    longest: int
    histogram: Histogram


class Lengths:
    """Counts the lengths of prompts, completions and whole sequences."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[int]] = {
            name: Counter() for name in ("prompt", "chosen", "rejected", "sequence")
        }
        self._totals: Counter[str] = Counter()
        self._longest: Counter[str] = Counter()

    def add(self, row: SeenRow) -> None:
        """Count one row."""
        prompt, chosen, rejected = row.sizes
        values = (prompt, chosen, rejected, prompt + max(chosen, rejected))
        for (name, counts), value in zip(self._counts.items(), values, strict=True):
            counts[_rounded(value)] += 1
            self._totals[name] += value
            self._longest[name] = max(self._longest[name], value)

    def findings(self) -> list[Finding]:
        """None: a length alone is not wrong."""
        return []

    def summaries(self) -> dict[str, LengthSummary]:
        """Of prompt, chosen, rejected, and of the sequence (prompt + longer completion)."""
        if not self._counts["prompt"]:
            return {}
        # The two completions are there to be compared: one scale for both.
        axes: dict[str, tuple[Counter[int], ...]] = {
            name: (counts,) for name, counts in self._counts.items()
        }
        axes["chosen"] = axes["rejected"] = (self._counts["chosen"], self._counts["rejected"])
        return {
            name: LengthSummary(
                self._totals[name] / counts.total(),
                _quantile(counts, 0.5),
                _quantile(counts, 0.95),
                self._longest[name],
                _histogram(counts, axes[name]),
            )
            for name, counts in self._counts.items()
        }


def _rounded(length: int) -> int:
    """Three figures for the very long ones, so that the counts stay few."""
    if length < _EXACT_BELOW:
        return length
    unit = int(10 ** (math.floor(math.log10(length)) - 2))
    return int(length // unit * unit)


def _quantile(counts: Counter[int], share: float) -> int:
    wanted, seen = share * counts.total(), 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    return 0


def _bar_width(most: int) -> int:
    """1, 2 or 5 times a power of ten, so that `_BARS` bars reach `most`."""
    least = max(most / _BARS, 1)
    power = int(10 ** math.floor(math.log10(least)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _histogram(counts: Counter[int], axis: tuple[Counter[int], ...]) -> Histogram:
    """Bars of `counts` on a scale that suits all of `axis`."""
    width = _bar_width(max(_quantile(each, 0.99) for each in axis))
    bars = [0] * (min(max(max(each) for each in axis) // width, _BARS) + 1)
    for length, rows in counts.items():
        bars[min(length // width, len(bars) - 1)] += rows
    return Histogram(width, tuple(bars))
