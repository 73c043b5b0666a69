"""What every backend is given: an LM head, and what a pass over its vocabulary returns.

Legend: M scored rows, D hidden size, r rank of a low-rank addition to the head, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadTransform(NamedTuple):
    """What stands between the head's matrix product and the softmax."""

    logit_scale: float
    softcap: float | None


class Head(NamedTuple):
    """logits = transform(rows @ [weight, low_rank].T + bias), with rows [M, D + r]."""

    weight: Tensor  # [V, D]
    low_rank: Tensor | None  # [V, r], a LoRA's B
    bias: Tensor | None  # [V]
    transform: HeadTransform
    padding: int = 0  # columns of zeros after both, for the alignment of copies

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D + r and the padding: what a row must have."""
        rank = 0 if self.low_rank is None else self.low_rank.shape[1]
        return self.weight.shape[1] + rank + self.padding

    def block(self, start: int, stop: int) -> Tensor:
        """Columns of the vocabulary, [B, D + r]: a view, or a copy where two parts meet."""
        block = self.weight[start:stop]
        if self.low_rank is None:
            return block
        parts = [block, self.low_rank[start:stop]]
        if self.padding:
            parts.append(block.new_zeros(block.shape[0], self.padding))
        return torch.cat(parts, dim=1)

    def bias_block(self, start: int, stop: int) -> Tensor | None:
        """The same columns of the bias, [B]."""
        return None if self.bias is None else self.bias[start:stop]

    def target_rows(self, targets: Tensor) -> Tensor:
        """Return the head's row of each target, [M, D + r]."""
        if self.low_rank is None:
            return self.weight[targets]
        return torch.cat([self.weight[targets], self.low_rank[targets]], dim=1)


class RestSums(NamedTuple):
    """One pass over the vocabulary: per row, what the loss and its gradient need."""

    rest_lse: Tensor  # [M] r, logsumexp of the logits without the target's
    log_odds_against: Tensor  # [M] d = r - z_target
    direction: Tensor | None  # [M, D + r] d logp / d rows, divided by q


class Wanted(NamedTuple):
    """Which gradients of a head that trains are asked for."""

    rows: bool
    weight: bool
    low_rank: bool
    bias: bool


class HeadGradients(NamedTuple):
    """Gradients of a head that trains; None where not asked for."""

    rows: Tensor | None  # [M, D + r]
    weight: Tensor | None  # [V, D]
    low_rank: Tensor | None  # [V, r]
    bias: Tensor | None  # [V]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
