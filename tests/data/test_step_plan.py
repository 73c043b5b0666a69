"""Padded rows: counts, masks and targets of a step's row batches, checked against a slow loop."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo.data.step_plan import RowPlanner

PAD = 0
BOTH_RULES = pytest.mark.parametrize("nll_tokens", ["prompt_and_completion", "completion"])


def pair(prompt: int, chosen: int, rejected: int, *, start: int = 1) -> dict:
    """Every token of the pair is different, so a target that is off by one shows."""
    ids = iter(range(start, start + prompt + chosen + rejected))
    row = {
        f"{name}_input_ids": [next(ids) for _ in range(count)]
        for name, count in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
    }
    return {**row, "length": prompt + max(chosen, rejected), "row": 0}


def pairs_of(lengths) -> list[dict]:
    return [pair(*each, start=1 + 100 * i) for i, each in enumerate(lengths)]


def padded(nll_tokens: str, budget: int) -> RowPlanner:
    return RowPlanner(PAD, nll_tokens, budget, shares_prefixes=False)


class Scored(NamedTuple):
    context: tuple[int, ...]  # the tokens that the model sees
    target: int
    completion: int  # 0 chosen, 1 rejected, -1 a prompt token
    in_nll: bool


def scored_by_a_slow_loop(row: dict, nll_tokens: str) -> set[Scored]:
    out = set()
    prompt = row["prompt_input_ids"]
    for which, column in enumerate(("chosen_input_ids", "rejected_input_ids")):
        sequence = [*prompt, *row[column]]
        for position in range(1, len(sequence)):
            context, target = tuple(sequence[:position]), sequence[position]
            if position >= len(prompt):
                out.add(Scored(context, target, which, which == 0))
            elif which == 0 and nll_tokens == "prompt_and_completion":
                out.add(Scored(context, target, -1, True))
    return out


def scored_in_plan(row_batch) -> list[set[Scored]]:
    """What a row batch scores, pair by pair; fails on a scored padding position."""
    n = row_batch.pair_count
    found: list[set[Scored]] = [set() for _ in range(n)]
    length = row_batch.inputs["input_ids"].shape[1]
    columns = (row_batch.score_index, row_batch.targets, row_batch.completion_ids)
    for index, target, completion, in_nll in zip(
        *(column.tolist() for column in columns), row_batch.nll_mask.tolist(), strict=True
    ):
        row, position = divmod(index, length)
        assert row_batch.inputs["attention_mask"][row, : position + 2].all()
        context = tuple(row_batch.inputs["input_ids"][row, : position + 1].tolist())
        if completion >= 0:
            assert completion // 2 == row % n
        scored = Scored(context, target, completion % 2 if completion >= 0 else -1, in_nll)
        assert scored not in found[row % n]
        found[row % n].add(scored)
    return found


lengths_of_pairs = st.lists(
    st.tuples(st.integers(1, 6), st.integers(2, 7), st.integers(2, 7)), min_size=1, max_size=7
)


@BOTH_RULES
@given(lengths=lengths_of_pairs, budget=st.integers(2, 90))
@settings(max_examples=60, deadline=None)
def test_exactly_the_right_positions_are_scored_whatever_the_lengths(nll_tokens, lengths, budget):
    pairs = pairs_of(lengths)
    planner = padded(nll_tokens, budget)
    plan = planner.plan(pairs)
    found = [scored for row_batch in plan for scored in scored_in_plan(row_batch)]
    expected = [scored_by_a_slow_loop(row, nll_tokens) for row in pairs]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    # The normaliser counts what the mask marks.
    marked = sum(int(row_batch.nll_mask.sum()) for row_batch in plan)
    assert planner.count_nll_tokens(pairs) == marked
    assert sum(row_batch.pair_count for row_batch in plan) == len(pairs)
    tokens = sum(2 * p + c + r for p, c, r in lengths)
    assert sum(row_batch.tokens for row_batch in plan) == tokens


@given(lengths=lengths_of_pairs, budget=st.integers(2, 90))
@settings(max_examples=40, deadline=None)
def test_rows_are_right_padded_chosen_first_and_the_longest_come_first(lengths, budget):
    plan = padded("completion", budget).plan(pairs_of(lengths))
    widths = [row_batch.inputs["input_ids"].shape[1] for row_batch in plan]
    assert widths == sorted(widths, reverse=True)
    assert max(widths) == max(p + max(c, r) for p, c, r in lengths)
    for row_batch in plan:
        n = row_batch.pair_count
        assert n == 1 or row_batch.inputs["input_ids"].numel() <= budget
        assert (
            row_batch.inputs["input_ids"].shape
            == row_batch.inputs["attention_mask"].shape
            == (2 * n, widths.pop(0))
        )
        # Right-padded: a mask never rises again, and padding holds the pad token.
        assert (row_batch.inputs["attention_mask"].diff(dim=1) <= 0).all()
        assert (row_batch.inputs["input_ids"][row_batch.inputs["attention_mask"] == 0] == PAD).all()
        chosen, rejected = (
            row_batch.inputs["input_ids"][:n, 0],
            row_batch.inputs["input_ids"][n:, 0],
        )
        assert torch.equal(chosen, rejected)  # the same pair's prompt begins both


def test_prompt_tokens_are_scored_once_and_for_the_nll_alone():
    (row_batch,) = padded("prompt_and_completion", 99).plan([pair(3, 2, 2)])
    assert row_batch.completion_ids.tolist() == [-1, -1, 0, 0, 1, 1]
    assert row_batch.nll_mask.tolist() == [True, True, True, True, False, False]
    assert row_batch.targets.tolist() == [2, 3, 4, 5, 6, 7]


def test_without_prompt_tokens_in_the_nll_only_completions_are_scored():
    (row_batch,) = padded("completion", 99).plan([pair(3, 2, 2)])
    assert row_batch.completion_ids.tolist() == [0, 0, 1, 1]
    assert row_batch.targets.tolist() == [4, 5, 6, 7]
    assert row_batch.nll_mask.tolist() == [True, True, False, False]


@BOTH_RULES
def test_a_step_of_repeats_alone_runs_the_trunk_and_scores_nothing(nll_tokens):
    planner = padded(nll_tokens, 99)
    (row_batch,) = planner.plan([], pairs_of([(3, 2, 2), (4, 2, 3)]))
    assert row_batch.inputs["input_ids"].shape == (2, 5)
    assert row_batch.score_index.numel() == row_batch.targets.numel() == 0
    assert row_batch.completion_ids.numel() == row_batch.nll_mask.numel() == 0
    assert planner.count_nll_tokens([]) == 0


def test_repeats_beside_true_pairs_cost_nothing():
    true, repeated = pairs_of([(3, 2, 2), (4, 2, 3)])
    (row_batch,) = padded("completion", 99).plan([true], [repeated])
    assert row_batch.pair_count == 1
    assert row_batch.inputs["input_ids"].shape == (2, 5)


def test_no_pairs_need_no_rows():
    assert padded("completion", 99).plan([]) == []
