"""What dropout and the like draw from, as it is at a moment."""

import random
from typing import Any, NamedTuple

import numpy
import torch


class RandomState(NamedTuple):
    """The states of all generators of this process."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]
    mps: torch.Tensor | None

    @staticmethod
    def now() -> "RandomState":
        """The states at this moment."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        cpu = torch.random.get_rng_state()
        return RandomState(random.getstate(), numpy.random.get_state(), cpu, cuda, mps)

    def put_back(self) -> None:
        """Go on from here again."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda[: torch.cuda.device_count()])
        if self.mps is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.mps)
