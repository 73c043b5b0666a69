"""The rows of one optimiser step, planned from its pairs.

For now a row batch is chosen and rejected sequences beside each other, right-padded, pairs of
similar length together. The step's normalisers count all its pairs, so how it is cut into row
batches does not change the loss.

Legend: n pairs in a row batch, L its longest sequence, M scored positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = Mapping[str, Any]  # one row of `prepare_pairs`


class RowBatch(NamedTuple):
    """One forward pass of the trunk, and which of its positions are scored."""

    input_ids: Tensor
    """[2n, L] int64: n chosen sequences, then n rejected ones."""
    attention_mask: Tensor
    """[2n, L] int64, 0 on padding."""
    score_index: Tensor
    """[M] int64 into the flattened [2n * L] positions: those whose next token is scored."""
    targets: Tensor
    """[M] int64, that next token."""
    completion_ids: Tensor
    """[M] int64: 2i chosen, 2i+1 rejected token of pair i, -1 a prompt token."""
    nll_mask: Tensor
    """[M] bool, tokens of the NLL term."""
    pair_count: int
    tokens: int
    """Tokens that are no padding."""

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch on another device."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            score_index=self.score_index.to(device),
            targets=self.targets.to(device),
            completion_ids=self.completion_ids.to(device),
            nll_mask=self.nll_mask.to(device),
        )


class StepPlan(NamedTuple):
    """All row batches of one optimiser step on this rank, and the step's normalisers."""

    rows: list[RowBatch]
    nll_tokens: float
    """NLL tokens of the whole step, over all ranks."""
    pairs: float
    """Pairs of the whole step, over all ranks."""


class RowPlanner(NamedTuple):
    """How pairs become row batches."""

    pad_token_id: int
    nll_tokens: str
    """"prompt_and_completion" or "completion"."""
    pairs_per_row_batch: int

    def count_nll_tokens(self, pairs: Sequence[Pair]) -> int:
        """Tokens in the NLL term: everything a position predicts, or completions only."""
        prompts = sum(len(p["prompt_input_ids"]) - 1 for p in pairs)
        completions = sum(len(p["chosen_input_ids"]) for p in pairs)
        return completions + (prompts if self.nll_tokens == "prompt_and_completion" else 0)

    def plan(self, pairs: Sequence[Pair], repeats: Sequence[Pair] = ()) -> list[RowBatch]:
        """Cut pairs into row batches, the longest together.

        Args:
            pairs: the pairs of the step.
            repeats: pairs that a sampler repeated to even out the ranks. Nothing of them is
                scored; a rank that has no other pair passes one through the trunk, so that it
                takes part in the backward pass.

        Returns:
            At least one row batch for any pair.
        """
        order = [(pair, True) for pair in pairs]
        order.sort(key=lambda entry: -int(entry[0]["length"]))
        if not order:
            order = [(pair, False) for pair in repeats[:1]]
        size = self.pairs_per_row_batch
        return [
            self._row_batch(order[start : start + size]) for start in range(0, len(order), size)
        ]

    def _row_batch(self, entries: Sequence[tuple[Pair, bool]]) -> RowBatch:
        sequences = [list(p["prompt_input_ids"]) + list(p["chosen_input_ids"]) for p, _ in entries]
        sequences += [
            list(p["prompt_input_ids"]) + list(p["rejected_input_ids"]) for p, _ in entries
        ]
        longest = max(len(sequence) for sequence in sequences)
        input_ids = torch.full((len(sequences), longest), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        # Marks of the *predicted* token at each position; -2 is "not scored".
        completion_ids = torch.full_like(input_ids, -2)
        in_nll = torch.zeros_like(input_ids, dtype=torch.bool)
        for number, sequence in enumerate(sequences):
            pair_index, is_rejected = number % len(entries), number >= len(entries)
            pair, is_scored = entries[pair_index]
            length, prompt = len(sequence), len(pair["prompt_input_ids"])
            input_ids[number, :length] = torch.tensor(sequence, dtype=torch.int64)
            attention_mask[number, :length] = 1
            if not is_scored:
                continue
            completion_ids[number, prompt - 1 : length - 1] = 2 * pair_index + is_rejected
            if not is_rejected:
                start = prompt - 1
                if self.nll_tokens == "prompt_and_completion":
                    start = 0
                    completion_ids[number, : prompt - 1] = -1
                in_nll[number, start : length - 1] = True
        score_index = (completion_ids.view(-1) != -2).nonzero().squeeze(1)
        next_ids = input_ids.roll(-1, dims=1).view(-1)
        return RowBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            score_index=score_index,
            targets=next_ids[score_index],
            completion_ids=completion_ids.view(-1)[score_index],
            nll_mask=in_nll.view(-1)[score_index],
            pair_count=len(entries),
            tokens=int(attention_mask.sum()),
        )
