"""The row that takes the most memory in a run, from the lengths of its pairs alone.

The order of an epoch is not known beforehand, so it is not asked which rows there will be, but
which there may be: any pairs of the data set can meet in a step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .row_batch import PlannedPair, RowBatch
from .row_tokens import pair_lengths
from .step_plan import RowPlanner

Lengths = tuple[int, int, int]

# Packed rows are filled from the longest pair down, and again without the longest of all, and
# so on: how often. Which pairs fill a row best is a knapsack; this finds a row nearly full.
_ATTEMPTS = 32


def largest_row(planner: RowPlanner, dataset: Any, pairs_per_step: int) -> RowBatch:
    """Build the largest row that some order of the data can give.

    Args:
        planner: how pairs become rows.
        dataset: prepared pairs (`prepare_pairs`), at least one.
        pairs_per_step: pairs of an optimiser step on this rank.

    Returns:
        A row batch of that shape; all its token ids are 0. Packed rows may come to a few tokens
        more in an order that fills them better.
    """
    lengths = sorted(_passed(planner, dataset), key=sum, reverse=True)
    if planner.shares_prefixes:
        candidates = (
            _filled(lengths[first:], planner.max_tokens_per_row, pairs_per_step)
            for first in range(min(_ATTEMPTS, len(lengths)))
        )
        chosen = max(candidates, key=lambda row: sum(map(sum, row)))
    else:
        budget = planner.max_tokens_per_row // (1 if planner.chosen_only else 2)
        chosen = _most_padded(lengths, budget, pairs_per_step)
    return planner.row_batch([_pair_of(pair) for pair in chosen])


def longest_pair(planner: RowPlanner, dataset: Any) -> int:
    """Positions of the longest pair's own row: no row budget below it makes rows shorter."""
    return max(planner.positions([_pair_of(pair)]) for pair in _passed(planner, dataset))


def _passed(planner: RowPlanner, dataset: Any) -> Iterator[Lengths]:
    for prompt, chosen, rejected in pair_lengths(dataset):
        yield prompt, chosen, 0 if planner.chosen_only else rejected


def _filled(lengths: Sequence[Lengths], budget: int, most: int) -> list[Lengths]:
    row, left = [lengths[0]], budget - sum(lengths[0])
    for pair in lengths[1:]:
        if len(row) == most or left <= 0:
            break
        if sum(pair) <= left:
            row.append(pair)
            left -= sum(pair)
    return row


def _most_padded(lengths: Sequence[Lengths], budget: int, most: int) -> list[Lengths]:
    """Pairs of a padded row: all are padded to the first, which has the longest sequence.

    `budget` is of one sequence a pair.
    """
    by_longest = sorted(lengths, key=_longest, reverse=True)

    def count(first: int) -> int:
        fitting = budget // _longest(by_longest[first])
        return max(min(fitting, most, len(by_longest) - first), 1)

    first = max(range(len(by_longest)), key=lambda i: count(i) * _longest(by_longest[i]))
    return by_longest[first : first + count(first)]


def _longest(pair: Lengths) -> int:
    return pair[0] + max(pair[1], pair[2])


def _pair_of(lengths: Lengths) -> PlannedPair:
    prompt, chosen, rejected = ([0] * length for length in lengths)
    return PlannedPair(prompt, chosen, rejected, is_scored=True)
