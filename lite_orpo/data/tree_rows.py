"""Packed rows: each pair once as [prompt | chosen | rejected], pairs end to end, no padding.

Both completions continue from the prompt's end: their position ids begin there, and no token of
one may see the other, nor another pair. That is the attention's part (`model/tree_attention.py`);
it knows the layout by `tree_spans`. Source of the layout for two completions: Wang & Hegde,
arXiv 2410.20305, section 3.

Legend: T tokens of a row; a span is (start, P, (C, R)): where the pair begins, then the tokens of
its prompt and of its two branches (one, where a loss has no use for the rejected one).
"""

from collections.abc import Sequence

import torch

from .row_batch import PROMPT_TOKEN, PlannedPair, RowBatch, ScoredPositions

Span = tuple[int, int, tuple[int, ...]]


def first_fit_decreasing(pairs: Sequence[PlannedPair], max_tokens: int) -> list[list[PlannedPair]]:
    """Distribute pairs over as few rows as first-fit-decreasing finds.

    Args:
        pairs: any pairs.
        max_tokens: most tokens of a row of more than one pair.

    Returns:
        Rows of at least one pair; a pair over the budget has a row of its own. At most
        11/9 of the fewest rows possible, plus one (Dosa 2007).
    """
    rows: list[list[PlannedPair]] = []
    room: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -pair.tree_tokens):
        tokens = pair.tree_tokens
        for number, left in enumerate(room):
            if tokens <= left:
                rows[number].append(pair)
                room[number] -= tokens
                break
        else:
            rows.append([pair])
            room.append(max_tokens - tokens)
    return rows


def tree_row_batch(pairs: Sequence[PlannedPair], *, nll_on_prompt: bool) -> RowBatch:
    """Lay pairs out in one packed row.

    Args:
        pairs: n pairs.
        nll_on_prompt: whether prompt tokens count in the NLL term; they are scored once.

    Returns:
        A row batch with `input_ids`, `position_ids` [1, T] int64 and `tree_spans`, plain nested
        tuples of ints (the Trainer moves tensors in tuples and leaves ints alone).
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    spans: list[Span] = []
    scored = ScoredPositions()
    for number, pair in enumerate(pairs):
        start, prompt = len(input_ids), len(pair.prompt)
        branches = (pair.chosen, pair.rejected) if pair.rejected else (pair.chosen,)
        spans.append((start, prompt, tuple(len(branch) for branch in branches)))
        input_ids += pair.prompt
        position_ids += range(prompt)
        if pair.is_scored and nll_on_prompt:
            scored.add(range(start, start + prompt - 1), pair.prompt[1:], PROMPT_TOKEN, in_nll=True)
        for which, branch in enumerate(branches):
            begin = len(input_ids)
            input_ids += branch
            position_ids += range(prompt, prompt + len(branch))
            if pair.is_scored:
                # The prompt's last position predicts the first token of every branch.
                index = [start + prompt - 1, *range(begin, begin + len(branch) - 1)]
                scored.add(index, branch, 2 * number + which, in_nll=which == 0)
    inputs = {
        "input_ids": torch.tensor([input_ids], dtype=torch.int64),
        "position_ids": torch.tensor([position_ids], dtype=torch.int64),
        "tree_spans": tuple(spans),
    }
    return scored.row_batch(inputs, pairs)
