"""What ranks must know of each other: whose pairs are repeats, how many rows the others have."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ..data.row_batch import Pair, PlannedPair, RowBatch
from ..data.step_plan import RowPlanner


def own_pair_count(trainer: Any, fetched: int) -> int:
    """How many of a batch's pairs are not repeats that even out the ranks' last batch.

    Args:
        trainer: in the middle of an epoch.
        fetched: pairs of the batch that its loader just gave.
    """
    state = trainer.accelerator.gradient_state
    ranks = trainer.args.world_size
    if ranks == 1 or trainer.args.dataloader_drop_last or not state.end_of_dataloader:
        return fetched
    # Not state.remainder: accelerate loses it where a resumed epoch skips batches.
    remainder = len(state.active_dataloader.dataset) % (fetched * ranks)
    if remainder == 0:
        return fetched
    before = trainer.args.process_index * fetched
    return int(min(max(remainder - before, 0), fetched))


def fetch_pairs(
    trainer: Any, batches: Iterator[Any], most: int
) -> tuple[list[Pair], list[Pair], int]:
    """Take the pairs of up to `most` batches, this rank's own and repeated ones apart.

    Returns:
        Own pairs, repeats, and how many batches there were.
    """
    pairs: list[Pair] = []
    repeats: list[Pair] = []
    fetched = 0
    for batch in islice(batches, most):
        fetched += 1
        own = own_pair_count(trainer, len(batch["pairs"]))
        pairs += batch["pairs"][:own]
        repeats += batch["pairs"][own:]
    return pairs, repeats, fetched


def plan_rows(
    trainer: Any, planner: RowPlanner, pairs: list[Pair], repeats: list[Pair]
) -> list[RowBatch]:
    """The rows of these pairs; as many on each rank, where ranks wait for each other in a row."""
    rows = planner.plan(pairs, repeats)
    if trainer.equal_rows and trainer.args.world_size > 1:
        own = torch.tensor([len(rows)], device=trainer.args.device)
        missing = int(trainer.accelerator.gather(own).max()) - len(rows)
        shortest = min([*pairs, *repeats], key=lambda pair: PlannedPair.of(pair).tree_tokens)
        rows += [planner.unscored(shortest)] * missing
    return rows
