"""Row batches of separate sequences, right-padded: chosen ones, then rejected ones, if any.

The layout that every causal model can run; the prompt of each pair is encoded twice.
"""

from collections.abc import Sequence

import torch

from .row_batch import PROMPT_TOKEN, PlannedPair, RowBatch, ScoredPositions


def group_by_length(pairs: Sequence[PlannedPair], max_tokens: int) -> list[list[PlannedPair]]:
    """Put pairs of similar length together, the longest first.

    Args:
        pairs: any pairs.
        max_tokens: most positions, padding included, of a group of more than one pair.

    Returns:
        Groups of at least one pair; a pair over the budget is alone.
    """
    groups: list[list[PlannedPair]] = []
    for pair in sorted(pairs, key=lambda pair: -pair.longest):
        sequences = sequences_a_pair(pairs) * (len(groups[-1]) + 1) if groups else 0
        if groups and sequences * groups[-1][0].longest <= max_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def sequences_a_pair(pairs: Sequence[PlannedPair]) -> int:
    """How many sequences a pair is: one, where all of them are without a rejected completion."""
    return 2 if any(pair.rejected for pair in pairs) else 1


def padded_row_batch(
    pairs: Sequence[PlannedPair], pad_token_id: int, *, nll_on_prompt: bool
) -> RowBatch:
    """Lay pairs out as [2n, L]: n chosen sequences, then n rejected ones, padded on the right.

    Without any rejected completion it is [n, L].

    Args:
        pairs: n pairs.
        pad_token_id: what fills the rows; it is masked and never scored.
        nll_on_prompt: whether prompt tokens count in the NLL term.

    Returns:
        A row batch with `input_ids` and `attention_mask` [2n, L] or [n, L] int64.
    """
    sequences = [[*p.prompt, *p.chosen] for p in pairs]
    if sequences_a_pair(pairs) == 2:
        sequences += [[*p.prompt, *p.rejected] for p in pairs]
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    scored = ScoredPositions()
    for number, sequence in enumerate(sequences):
        pair_index, is_rejected = number % len(pairs), number >= len(pairs)
        pair, start = pairs[pair_index], number * longest
        length, prompt = len(sequence), len(pair.prompt)
        input_ids[number, :length] = torch.tensor(sequence, dtype=torch.int64)
        attention_mask[number, :length] = 1
        if not pair.is_scored:
            continue
        if nll_on_prompt and not is_rejected:
            scored.add(
                range(start, start + prompt - 1), sequence[1:prompt], PROMPT_TOKEN, in_nll=True
            )
        scored.add(
            range(start + prompt - 1, start + length - 1),
            sequence[prompt:],
            2 * pair_index + is_rejected,
            in_nll=not is_rejected,
        )
    return scored.row_batch({"input_ids": input_ids, "attention_mask": attention_mask}, pairs)
