"""The largest row of a run is found from lengths alone, whatever the order of the data."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo.data.largest_row import largest_row, longest_pair
from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.step_plan import RowPlanner

LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))


def pairs_of(lengths):
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    return [
        {name: [7] * length for name, length in zip(names, three, strict=True)} for three in lengths
    ]


def positions(row):
    return row.inputs["input_ids"].numel()


@settings(deadline=None, max_examples=60)
@given(st.lists(LENGTHS, min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_no_row_of_an_epoch_in_order_is_larger(lengths, pairs_per_step, shares):
    planner = RowPlanner(0, "completion", 150, shares)
    pairs = pairs_of(lengths)
    most = 0
    for start in range(0, len(pairs), pairs_per_step):
        most = max(most, *map(positions, planner.plan(pairs[start : start + pairs_per_step])))
    found = largest_row(planner, pairs, pairs_per_step)
    assert positions(found) >= most
    assert positions(found) <= max(150, longest_pair(planner, pairs))


@pytest.mark.parametrize("shares", [True, False])
def test_an_order_that_spreads_the_long_pairs_out_does_not_hide_them(shares):
    long, short = (50, 30, 20), (5, 3, 2)
    planner = RowPlanner(0, "completion", 1000, shares)
    spread = pairs_of([long, short, short, short] * 4)
    together = planner.plan(pairs_of([long] * 4))
    assert positions(largest_row(planner, spread, 4)) == positions(together[0])


@pytest.mark.parametrize("shares", [True, False])
def test_the_longest_pair_is_that_of_its_own_row(shares):
    planner = RowPlanner(0, "completion", 10, shares)
    assert longest_pair(planner, pairs_of([(9, 4, 3), (2, 1, 12)])) == (16 if shares else 28)


@pytest.mark.parametrize("shares", [True, False])
def test_positions_are_those_of_the_row_batch(shares):
    planner = RowPlanner(0, "completion", 1000, shares)
    pairs = [PlannedPair.of(pair) for pair in pairs_of([(9, 4, 3), (2, 1, 12), (30, 5, 6)])]
    assert planner.positions(pairs) == positions(planner.row_batch(pairs))
