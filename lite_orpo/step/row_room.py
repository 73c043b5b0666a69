"""Out of memory in a step: the budget of a row is halved, and the step is taken again as a whole.

A failed backward pass leaves gradients behind that are neither the old nor the new ones, so
nothing of the failed attempt is kept: gradients are dropped, the random states are put back, and
the pairs of the step are planned anew. The effective batch stays what it was.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from ..allocator_failure import is_out_of_memory
from ..data.row_batch import RowBatch
from ..errors import OutOfMemory
from .random_state import RandomState

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class _Watched(list[RowBatch]):
    """A plan that remembers which of its rows was taken last."""

    last: RowBatch | None = None

    def __iter__(self) -> Iterator[RowBatch]:
        for row in super().__iter__():
            self.last = row
            yield row


class RowRoom:
    """Tokens that a row may have. They shrink where memory runs out, and stay so."""

    def __init__(self, max_tokens: int, of_what: str, ranks: int, remedy: str) -> None:
        self.max_tokens = max_tokens
        self._of_what = of_what
        self._ranks = ranks
        self._remedy = remedy

    def limit(self, max_tokens: int) -> None:
        """Allow no more than this from now on."""
        self.max_tokens = max(min(self.max_tokens, max_tokens), 1)

    def make(
        self,
        rows: list[RowBatch],
        attempt: Callable[[list[RowBatch]], Result],
        plan_again: Callable[[], list[RowBatch]],
    ) -> tuple[Result, list[RowBatch]]:
        """Run all rows; where memory runs out, all of them again in smaller ones.

        Args:
            rows: the plan to begin with.
            attempt: runs a plan from its first row to its last.
            plan_again: undoes what an attempt left, and plans the same pairs for `max_tokens`.

        Returns:
            What the attempt that went through returned, and its rows.

        Raises:
            OutOfMemory: every row holds a single pair already, or there are other ranks, which
                wait in the middle of the step.
        """
        before = RandomState.now()
        while True:
            watched = _Watched(rows)
            try:
                return attempt(watched), rows
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Here, where nothing holds the failed attempt's tensors through its traceback.
            self._shrink(rows, watched.last)
            del watched
            rows = []
            give_memory_back()
            before.put_back()
            rows = plan_again()

    def _shrink(self, rows: Sequence[RowBatch], failed: RowBatch | None) -> None:
        longest = max(_positions(row) for row in rows)
        if self._ranks > 1:
            raise OutOfMemory(
                f"out of memory in {self._of_what} with rows of up to {longest:,} tokens, on one "
                f"of {self._ranks} ranks, which cannot take it again alone; lower "
                "max_tokens_per_row"
            )
        # A short row may fail where longer ones have left too little; the longest cannot be cut.
        is_longest_alone = (
            failed is not None and failed.pair_count == 1 and _positions(failed) == longest
        )
        if is_longest_alone or all(row.pair_count == 1 for row in rows):
            raise OutOfMemory(
                f"out of memory in {self._of_what} with a single pair of {longest:,} tokens in a "
                f"row; lower max_length, {self._remedy}, or take a smaller model"
            )
        self.max_tokens = max(min(self.max_tokens, longest) // 2, 1)
        logger.warning(
            "out of memory in %s with rows of up to %s tokens: taken again, and from now on, "
            "with at most %s (max_tokens_per_row); the pairs of a step stay the same",
            self._of_what,
            f"{longest:,}",
            f"{self.max_tokens:,}",
        )


def _positions(row: RowBatch) -> int:
    return int(row.inputs["input_ids"].numel())


def give_memory_back() -> None:
    """Free what the failed attempt left to the garbage collector and to the allocator's cache."""
    # A backward pass that failed in a recomputation leaves its unfinished tasks, with the tensors
    # that they hold, in autograd's queue; the next backward pass of this thread clears it.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
