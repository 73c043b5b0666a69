"""Token log-probabilities -> those of whole completions.

Legend: M scored tokens, P pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
        Sums and lengths, differentiable in `logps`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logps.ndim != 1 or logps.shape != completion_ids.shape:
        raise ValueError(
            f"logps and completion_ids must both be [M], found {tuple(logps.shape)} and "
            f"{tuple(completion_ids.shape)}"
        )
    logps = logps if logps.dtype == torch.float64 else logps.float()
    completions = torch.arange(2 * pair_count, device=logps.device)
    # A sum along rows has the same bits each time; index_add on a GPU has not.
    is_own = completion_ids.unsqueeze(0) == completions.unsqueeze(1)  # [2P, M]
    sums = torch.where(is_own, logps.unsqueeze(0), logps.new_zeros(())).sum(1)
    tokens = is_own.sum(1).to(logps.dtype)
    return CompletionLogps(sums[0::2], sums[1::2], tokens[0::2], tokens[1::2])
