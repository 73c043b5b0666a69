"""Pairs of similar length together, in an order that is of the epoch alone.

transformers' sampler draws from the generator that dropout draws from as well: where an epoch
began in the middle of a run, a resumed run cannot draw the same again, and ranks may differ.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthOrder(Sampler[int]):
    """Grouped by length as transformers does it, with a seed for every epoch.

    Args:
        lengths: tokens of each pair.
        pairs: of an optimiser step, over all ranks.
        seed: of the run's data.
        epoch: says which epoch begins, from 0.
    """

    def __init__(
        self, lengths: Sequence[int], pairs: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self._lengths, self._pairs = lengths, pairs
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(get_length_grouped_indices(self._lengths, self._pairs, generator=generator))
