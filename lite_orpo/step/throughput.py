"""How fast training goes: what passed through the model since the last log line, and the time."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.row_batch import RowBatch
from ..memory.device import peak_bytes


class Throughput:
    """Counts of one rank between two log lines."""

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.steps = 0
        self._counts = [0, 0, 0, 0]  # tokens, tokens of separate sequences, rows, pairs
        self._started: float | None = None

    def begin_step(self) -> None:
        """Start the clock, unless it runs since an earlier step."""
        if self._started is None:
            self._started = time.perf_counter()

    def end_step(self, rows: Sequence[RowBatch], pairs: int) -> None:
        """Count the rows of a finished step and the pairs that they trained on."""
        self.steps += 1
        of_step = (
            sum(row.tokens for row in rows),
            sum(row.separate_tokens for row in rows),
            len(rows),
            pairs,
        )
        self._counts = [count + more for count, more in zip(self._counts, of_step, strict=True)]

    def leave_out(self, seconds: float) -> None:
        """Take time off the clock that went into something else."""
        if self._started is not None:
            self._started += seconds

    def take(self, device: torch.device, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures over all ranks since the last call, named for the log; begins anew.

        Args:
            device: where the sum over ranks is taken.
            reduce: sums a tensor over the ranks.

        Returns:
            Rates over all ranks; the peak of memory is this rank's, since the process began.
        """
        seconds = max(time.perf_counter() - (self._started or 0.0), 1e-9)
        local = torch.tensor(self._counts, dtype=torch.float32, device=device)
        tokens, separate, rows, pairs = reduce(local).tolist()
        steps = self.steps
        self._begin_anew()
        peak = peak_bytes(device)
        return {
            "lite_orpo/tokens_per_second": tokens / seconds,
            "lite_orpo/pairs_per_second": pairs / seconds,
            "lite_orpo/rows_per_step": rows / max(steps, 1),
            "lite_orpo/tokens_saved": 1.0 - tokens / max(separate, 1.0),
            **({} if peak is None else {"lite_orpo/peak_memory_mib": peak / 2**20}),
        }
