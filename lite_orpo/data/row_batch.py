"""What one forward pass of the trunk gets, and which of its positions are scored.

Legend: B sequences, L their length, M scored positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = Mapping[str, Any]  # one row of `prepare_pairs`

PROMPT_TOKEN = -1
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


class PlannedPair(NamedTuple):
    """A pair's token ids on their way into a row."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    is_scored: bool
    """False: the pair goes through the trunk, but nothing of it is scored."""
    reference: tuple[float, float] | None = None
    """Summed log-probabilities of chosen and rejected by a reference model."""
    number: int = 0
    """Its place among the pairs that are planned."""

    @staticmethod
    def of(
        pair: Pair, *, is_scored: bool = True, number: int = 0, chosen_only: bool = False
    ) -> "PlannedPair":
        """From a row of the prepared data set; `chosen_only`: without its rejected completion."""
        reference = None
        if REFERENCE_COLUMNS[0] in pair:
            chosen, rejected = (float(pair[column]) for column in REFERENCE_COLUMNS)
            reference = (chosen, rejected)
        return PlannedPair(
            list(pair["prompt_input_ids"]),
            list(pair["chosen_input_ids"]),
            [] if chosen_only else list(pair["rejected_input_ids"]),
            is_scored,
            reference,
            number,
        )

    @property
    def tree_tokens(self) -> int:
        """Tokens if the prompt is encoded once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class RowBatch(NamedTuple):
    """One forward pass of the trunk, and which of its positions are scored."""

    inputs: dict[str, Any]
    """Arguments of the model's forward: `input_ids` [B, L] int64 and what belongs to its layout."""
    score_index: Tensor
    """[M] int64 into the flattened [B * L] positions: those whose next token is scored. The last
    position of a shared prompt stands here twice, once for each completion's first token."""
    targets: Tensor
    """[M] int64, that next token."""
    completion_ids: Tensor
    """[M] int64: 2i chosen, 2i+1 rejected token of pair i, -1 a prompt token."""
    nll_mask: Tensor
    """[M] bool, tokens of the NLL term."""
    pair_count: int
    tokens: int
    """Tokens that are no padding."""
    separate_tokens: int
    """Tokens of the same pairs as two sequences each, without padding."""
    pair_numbers: tuple[int, ...] = ()
    """Of each pair, its place among those that were planned."""
    reference: Tensor | None = None
    """[P, 2] fp32, summed log-probabilities of chosen and rejected by a reference model."""

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch on another device."""
        return self._replace(
            inputs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.inputs.items()
            },
            score_index=self.score_index.to(device),
            targets=self.targets.to(device),
            completion_ids=self.completion_ids.to(device),
            nll_mask=self.nll_mask.to(device),
            reference=None if self.reference is None else self.reference.to(device),
        )


class ScoredPositions:
    """Collects the scored positions of a row batch."""

    def __init__(self) -> None:
        self._index: list[int] = []
        self._targets: list[int] = []
        self._completion_ids: list[int] = []
        self._in_nll: list[bool] = []

    def add(
        self, index: Sequence[int], targets: Sequence[int], completion_id: int, *, in_nll: bool
    ) -> None:
        """Score `targets`, each predicted at the position beside it."""
        count = len(targets)
        assert len(index) == count
        self._index += index
        self._targets += targets
        self._completion_ids += [completion_id] * count
        self._in_nll += [in_nll] * count

    def row_batch(self, inputs: dict[str, Any], pairs: Sequence[PlannedPair]) -> RowBatch:
        """The finished batch around the model's inputs."""
        separate = sum(p.tree_tokens + (len(p.prompt) if p.rejected else 0) for p in pairs)
        references = [p.reference for p in pairs if p.reference is not None]
        is_tree = "tree_spans" in inputs
        return RowBatch(
            inputs=inputs,
            score_index=torch.tensor(self._index, dtype=torch.int64),
            targets=torch.tensor(self._targets, dtype=torch.int64),
            completion_ids=torch.tensor(self._completion_ids, dtype=torch.int64),
            nll_mask=torch.tensor(self._in_nll, dtype=torch.bool),
            pair_count=len(pairs),
            tokens=inputs["input_ids"].numel() if is_tree else separate,
            separate_tokens=separate,
            pair_numbers=tuple(p.number for p in pairs),
            reference=(
                torch.tensor(references, dtype=torch.float32)
                if len(references) == len(pairs)
                else None
            ),
        )
