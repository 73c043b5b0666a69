"""The row that takes the most memory in a run, from the lengths of its pairs alone."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from .row_batch import PlannedPair, RowBatch
from .row_tokens import pair_lengths
from .step_plan import RowPlanner

Lengths = tuple[int, int, int]


def largest_row(planner: RowPlanner, dataset: Any, pairs_per_step: int) -> RowBatch:
    """Find the row with the most positions.

    The order of an epoch is not known beforehand: looked at are the steps in the data's own order
    and one step of the longest pairs, which is as much as any step can hold.

    Args:
        planner: how pairs become rows.
        dataset: prepared pairs (`prepare_pairs`), at least one.
        pairs_per_step: pairs of an optimiser step on this rank.

    Returns:
        A row batch of that shape; all its token ids are 0.
    """
    lengths = list(pair_lengths(dataset))
    longest = sorted(lengths, key=sum, reverse=True)[:pairs_per_step]
    rows = (
        row
        for step in (longest, *_in_steps(lengths, pairs_per_step))
        for row in planner.group([_pair_of(pair) for pair in step])
    )
    return planner.row_batch(max(rows, key=planner.positions))


def longest_pair(planner: RowPlanner, dataset: Any) -> int:
    """Positions of the longest pair's own row: no row budget below it makes rows shorter."""
    return max(planner.positions([_pair_of(pair)]) for pair in pair_lengths(dataset))


def _in_steps(lengths: list[Lengths], pairs_per_step: int) -> Iterator[list[Lengths]]:
    remaining = iter(lengths)
    while step := list(islice(remaining, pairs_per_step)):
        yield step


def _pair_of(lengths: Lengths) -> PlannedPair:
    prompt, chosen, rejected = ([0] * length for length in lengths)
    return PlannedPair(prompt, chosen, rejected, is_scored=True)
