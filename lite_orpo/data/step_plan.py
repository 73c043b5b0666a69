"""The rows of one optimiser step, planned from its pairs.

Two layouts: packed rows that encode each prompt once (`tree_rows.py`), and separate sequences,
right-padded, pairs of similar length together (`padded_rows.py`). The step's normalisers count
all its pairs, so neither the layout nor how it is cut into row batches changes the loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .padded_rows import group_by_length, padded_row_batch, sequences_a_pair
from .row_batch import Pair, PlannedPair, RowBatch
from .tree_rows import first_fit_decreasing, tree_row_batch


class StepPlan(NamedTuple):
    """All row batches of one optimiser step on this rank, and the step's normalisers."""

    rows: list[RowBatch]
    nll_tokens: float
    """NLL tokens of the whole step, over all ranks."""
    pairs: float
    """Pairs of the whole step, over all ranks."""
    own_pairs: list[Pair]
    """Pairs of this rank."""
    repeats: list[Pair]
    """Pairs of this rank that a sampler repeated; nothing of them is scored."""


class RowPlanner(NamedTuple):
    """How pairs become row batches."""

    pad_token_id: int
    nll_tokens: str
    """"prompt_and_completion" or "completion"."""
    max_tokens_per_row: int
    """Most positions of a row batch, padding included; one pair may be over it."""
    shares_prefixes: bool
    """Packed rows that encode each prompt once, or separate padded sequences."""
    chosen_only: bool = False
    """Leave the rejected completions out, for a loss that has no use for them."""

    def count_nll_tokens(self, pairs: Sequence[Pair]) -> int:
        """Tokens in the NLL term: everything a position predicts, or completions only."""
        prompts = sum(len(p["prompt_input_ids"]) - 1 for p in pairs)
        completions = sum(len(p["chosen_input_ids"]) for p in pairs)
        return completions + (prompts if self._nll_on_prompt else 0)

    def plan(self, pairs: Sequence[Pair], repeats: Sequence[Pair] = ()) -> list[RowBatch]:
        """Cut pairs into row batches.

        Args:
            pairs: the pairs of the step.
            repeats: pairs that a sampler repeated to even out the ranks. Nothing of them is
                scored; a rank that has no other pair passes one through the trunk, so that it
                takes part in the backward pass.

        Returns:
            At least one row batch for any pair.
        """
        planned = [
            PlannedPair.of(pair, number=number, chosen_only=self.chosen_only)
            for number, pair in enumerate(pairs)
        ]
        if not planned:
            planned = [self._unscored(pair) for pair in repeats[:1]]
        return [self.row_batch(row) for row in self.group(planned)]

    def group(self, pairs: Sequence[PlannedPair]) -> list[list[PlannedPair]]:
        """Distribute pairs over rows; at least one pair in each."""
        group = first_fit_decreasing if self.shares_prefixes else group_by_length
        return group(pairs, self.max_tokens_per_row)

    def positions(self, pairs: Sequence[PlannedPair]) -> int:
        """Positions of these pairs as one row batch, padding included."""
        if self.shares_prefixes:
            return sum(pair.tree_tokens for pair in pairs)
        return sequences_a_pair(pairs) * len(pairs) * max(pair.longest for pair in pairs)

    def unscored(self, pair: Pair) -> RowBatch:
        """A row batch of which nothing is scored, for a rank that must not run out of rows."""
        return self.row_batch([self._unscored(pair)])

    def _unscored(self, pair: Pair) -> PlannedPair:
        return PlannedPair.of(pair, is_scored=False, chosen_only=self.chosen_only)

    @property
    def _nll_on_prompt(self) -> bool:
        return self.nll_tokens == "prompt_and_completion"

    def row_batch(self, pairs: Sequence[PlannedPair]) -> RowBatch:
        """One row batch of these pairs, whatever its size."""
        if self.shares_prefixes:
            return tree_row_batch(pairs, nll_on_prompt=self._nll_on_prompt)
        return padded_row_batch(pairs, self.pad_token_id, nll_on_prompt=self._nll_on_prompt)
