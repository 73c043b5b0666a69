"""Token log-probabilities -> those of whole completions.

Legend: M scored tokens, P pairs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ELEMENTS_AT_ONCE = 16 * 2**20  # of a block of [completions, M] on a GPU: 64 MiB


class CompletionLogps(NamedTuple):
    """Summed log-probabilities of completions and their lengths. All [P]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def mean_chosen(self) -> Tensor:
        """Mean over a chosen completion's tokens; 0 where it has none here."""
        return self.chosen / self.chosen_tokens.clamp_min(1)

    @property
    def mean_rejected(self) -> Tensor:
        """Mean over a rejected completion's tokens; 0 where it has none here."""
        return self.rejected / self.rejected_tokens.clamp_min(1)

    @property
    def is_whole(self) -> Tensor:
        """Whether a pair has both its completions here, bool."""
        return (self.chosen_tokens > 0) & (self.rejected_tokens > 0)


def completion_logps(logps: Tensor, completion_ids: Tensor, pair_count: int) -> CompletionLogps:
    """Sum token log-probabilities completion by completion.

    Args:
        logps: [M] token log-probabilities; half precision is raised to fp32.
        completion_ids: [M] int64; 2n marks the chosen, 2n+1 the rejected tokens of pair n,
            -1 a token of neither.
        pair_count: P.

    Returns:
        Sums and lengths, differentiable once in `logps`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logps.ndim != 1 or logps.shape != completion_ids.shape:
        raise ValueError(
            f"logps and completion_ids must both be [M], found {tuple(logps.shape)} and "
            f"{tuple(completion_ids.shape)}"
        )
    logps = logps if logps.dtype == torch.float64 else logps.float()
    sums = _CompletionSums.apply(logps, completion_ids, 2 * pair_count)
    # The tokens of no completion fall into a slot of their own.
    slot = torch.where(completion_ids < 0, 2 * pair_count, completion_ids)
    counts = torch.zeros(2 * pair_count + 1, dtype=torch.int64, device=logps.device)
    tokens = counts.index_add_(0, slot, torch.ones_like(slot))[:-1].to(logps.dtype)
    return CompletionLogps(sums[0::2], sums[1::2], tokens[0::2], tokens[1::2])


class _CompletionSums(torch.autograd.Function):
    """Sums over tokens with the same bits for the same call, in memory bounded beside M."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, completion_ids: Tensor, completions: int) -> Tensor:
        ctx.save_for_backward(completion_ids)
        ctx.completions = completions
        # index_add on a GPU adds in any order; a sum along rows does not.
        sums = _sums_in_order if logps.device.type == "cpu" else _sums_in_blocks
        return sums(logps, completion_ids, completions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        (completion_ids,) = ctx.saved_tensors
        slot = torch.where(completion_ids < 0, ctx.completions, completion_ids)
        return torch.cat([gradients, gradients.new_zeros(1)])[slot], None, None


def _sums_in_order(logps: Tensor, completion_ids: Tensor, completions: int) -> Tensor:
    # fp64 on the way, so that long completions keep their digits.
    slot = torch.where(completion_ids < 0, completions, completion_ids)
    sums = torch.zeros(completions + 1, dtype=torch.float64)
    return sums.index_add_(0, slot, logps.double())[:completions].to(logps.dtype)


def _sums_in_blocks(logps: Tensor, completion_ids: Tensor, completions: int) -> Tensor:
    zero = logps.new_zeros(())
    at_once = max(_ELEMENTS_AT_ONCE // max(logps.numel(), 1), 1)
    blocks = [
        torch.where(completion_ids == own.unsqueeze(1), logps, zero).sum(1)
        for own in torch.arange(completions, device=logps.device).split(at_once)
    ]
    return torch.cat(blocks)
