"""Packed rows: what each scored position sees, and how pairs are distributed over rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step_plan import BOTH_RULES, PAD, lengths_of_pairs, pairs_of, scored_by_a_slow_loop

from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.row_tokens import RowTokens, count_row_tokens
from lite_orpo.data.step_plan import RowPlanner
from lite_orpo.data.tree_rows import first_fit_decreasing


def scored_in_tree(row) -> list[set]:
    """What a packed row scores, pair by pair; contexts are rebuilt from the spans."""
    tokens = row.inputs["input_ids"][0].tolist()
    positions = row.inputs["position_ids"][0].tolist()
    context_of = {}
    owner_of = {}
    for number, (start, prompt, branches) in enumerate(row.inputs["tree_spans"]):
        shared = tokens[start : start + prompt]
        for at in range(start, start + prompt):
            context_of[at] = tuple(tokens[start : at + 1])
        begin = start + prompt
        for branch in branches:
            for at in range(begin, begin + branch):
                context_of[at] = (*shared, *tokens[begin : at + 1])
            begin += branch
        owner_of.update(dict.fromkeys(range(start, begin), number))
    assert sorted(context_of) == list(range(len(tokens)))  # the spans cover the row
    for at, context in context_of.items():
        assert positions[at] == len(context) - 1
    found = [set() for _ in range(row.pair_count)]
    for index, target, completion, in_nll in zip(
        row.score_index.tolist(),
        row.targets.tolist(),
        row.completion_ids.tolist(),
        row.nll_mask.tolist(),
        strict=True,
    ):
        pair = owner_of[index]
        assert completion == -1 or completion // 2 == pair
        scored = (context_of[index], target, completion % 2 if completion >= 0 else -1, in_nll)
        assert scored not in found[pair]
        found[pair].add(scored)
    return found


@BOTH_RULES
@given(lengths=lengths_of_pairs, budget=st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_packed_rows_score_exactly_what_separate_sequences_do(nll_tokens, lengths, budget):
    pairs = pairs_of(lengths)
    planner = RowPlanner(PAD, nll_tokens, budget, shares_prefixes=True)
    plan = planner.plan(pairs)
    found = [scored for row in plan for scored in scored_in_tree(row)]
    expected = [{tuple(s) for s in scored_by_a_slow_loop(row, nll_tokens)} for row in pairs]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert planner.count_nll_tokens(pairs) == sum(int(row.nll_mask.sum()) for row in plan)
    assert sum(row.pair_count for row in plan) == len(pairs)
    assert sum(row.tokens for row in plan) == sum(p + c + r for p, c, r in lengths)
    assert sum(row.separate_tokens for row in plan) == sum(2 * p + c + r for p, c, r in lengths)
    for row in plan:
        assert row.inputs["input_ids"].shape == (1, row.tokens)  # no padding
        assert row.tokens <= budget or row.pair_count == 1


def test_a_layout_is_plain_nested_tuples_of_ints():
    (row,) = RowPlanner(PAD, "completion", 99, shares_prefixes=True).plan(pairs_of([(3, 2, 4)] * 2))
    assert row.inputs["tree_spans"] == ((0, 3, (2, 4)), (9, 3, (2, 4)))


def test_the_prompts_last_position_predicts_the_first_token_of_both_completions():
    (row,) = RowPlanner(PAD, "completion", 99, shares_prefixes=True).plan(pairs_of([(3, 2, 2)]))
    assert row.score_index.tolist() == [2, 3, 2, 5]
    assert row.targets.tolist() == [4, 5, 6, 7]


def planned(*tokens):
    return [PlannedPair([0], [0], [0] * (count - 2), is_scored=True) for count in tokens]


def totals(rows):
    return [[pair.tree_tokens for pair in row] for row in rows]


def test_first_fit_decreasing_fills_the_first_row_with_room():
    assert totals(first_fit_decreasing(planned(3, 7, 5, 4, 6), 10)) == [[7, 3], [6, 4], [5]]


def test_a_pair_over_the_budget_has_a_row_of_its_own():
    assert totals(first_fit_decreasing(planned(4, 30, 12, 6), 10)) == [[30], [12], [6, 4]]


@given(st.lists(st.integers(3, 40), min_size=1, max_size=40), st.integers(3, 60))
@settings(max_examples=100, deadline=None)
def test_no_two_rows_could_be_one(tokens, budget):
    rows = totals(first_fit_decreasing(planned(*tokens), budget))
    assert sorted(sum(rows, [])) == sorted(tokens)
    sums = [sum(row) for row in rows]
    for number, left in enumerate(sums):
        assert left <= budget or len(rows[number]) == 1
        assert all(left + right > budget for right in sums[number + 1 :])


def test_an_unscored_row_passes_the_trunk_and_scores_nothing():
    planner = RowPlanner(PAD, "prompt_and_completion", 99, shares_prefixes=True)
    row = planner.unscored(pairs_of([(3, 2, 2)])[0])
    assert row.inputs["input_ids"].shape == (1, 7)
    assert row.score_index.numel() == 0
    (repeated,) = planner.plan([], pairs_of([(3, 2, 2), (4, 2, 3)]))
    assert repeated.score_index.numel() == 0


@pytest.mark.parametrize("kind", ["list", "arrow"])
def test_tokens_of_an_epoch_are_counted_from_lengths_alone(kind):
    dataset = pairs_of([(3, 2, 4), (5, 1, 1), (2, 2, 2)])
    if kind == "arrow":
        import datasets

        dataset = datasets.Dataset.from_list(dataset)
    counted = count_row_tokens(dataset, pairs_per_batch=2)
    assert counted == RowTokens(packed=22, separate=32, padded=2 * 2 * 7 + 2 * 1 * 4)
