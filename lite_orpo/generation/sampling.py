"""Drawing the next token so that an answer depends on its own seed, not on its neighbours.

Gumbel noise is added to the logits and the highest one is taken, which is a draw from the softmax
(Gumbel-max). Each row has a generator of its own, so the same prompt with the same seed gets the
same answer in any batch, alone, or after a resumption; the process's generators are not touched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class GumbelNoise:
    """A logits processor for greedy decoding that makes of it a draw at a temperature.

    Args:
        seeds: one a row.
        temperatures: one a row, 0 for greedy.
    """

    def __init__(self, seeds: Sequence[int], temperatures: Sequence[float]) -> None:
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self._temperatures = temperatures

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] with each row's noise; greedy rows as they are."""
        scores = scores.float().clone()
        for row, temperature in enumerate(self._temperatures):
            if temperature > 0:
                # fp64: a uniform number of fp32 is 0 once in 2^24 draws, and has no logarithm.
                noise = torch.empty(scores.shape[1], dtype=torch.float64)
                noise.exponential_(generator=self._generators[row])
                gumbel = -noise.clamp_min(1e-300).log()
                scores[row] += (temperature * gumbel).to(scores.device, scores.dtype)
        return scores
