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
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=12),
    pairs_per_step=st.integers(1, 5),
    shares=st.booleans(),
    chosen_only=st.booleans(),
    random=st.randoms(),
)
def test_no_row_of_any_order_is_larger(lengths, pairs_per_step, shares, chosen_only, random):
    planner = RowPlanner(0, "completion", 150, shares, chosen_only)
    pairs = pairs_of(lengths)
    found = positions(largest_row(planner, pairs, pairs_per_step))
    for _ in range(10):
        random.shuffle(pairs)
        for start in range(0, len(pairs), pairs_per_step):
            for row in planner.plan(pairs[start : start + pairs_per_step]):
                # Packed rows are filled greedily, not best.
                assert positions(row) <= (1.1 * found if shares else found)
    assert found <= max(150, longest_pair(planner, pairs))


def test_a_long_pair_beside_a_short_one_may_be_more_than_two_long_ones():
    planner = RowPlanner(0, "completion", 2048, True)
    pairs = pairs_of([(1000, 200, 200)] * 20 + [(400, 120, 120)] * 20)
    assert positions(largest_row(planner, pairs, 2)) == 2040


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


@pytest.mark.parametrize("shares", [True, False])
def test_a_rejected_answer_that_no_step_passes_takes_no_room(shares):
    planner = RowPlanner(0, "completion", 30, shares, chosen_only=True)
    pairs = pairs_of([(9, 4, 60), (9, 4, 60)])
    assert longest_pair(planner, pairs) == 13
    assert positions(largest_row(planner, pairs, 1)) == 13
    assert positions(largest_row(planner, pairs, 2)) == 26
