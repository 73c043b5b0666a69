"""Log-probabilities of every pair of a data set, by the model as it stands.

What an evaluation by groups and a reference model need: no averages, but each pair's own figures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data.row_batch import Pair, RowBatch
from .data.row_tokens import pair_lengths
from .losses.completions import completion_logps
from .step.context import step_context
from .step.row_room import RowRoom

_BLOCK = 64  # pairs that are planned together


class PairScores(NamedTuple):
    """Of N pairs, in the order of their data set. All [N] on the CPU."""

    chosen: Tensor
    """fp64, log-probability of each chosen completion, summed over its tokens."""
    rejected: Tensor
    """fp64, the same of the rejected ones."""
    chosen_tokens: Tensor
    """int64, with the end token."""
    rejected_tokens: Tensor
    rows: Tensor
    """int64, each pair's row in the source it was read from, counted from 0."""

    @property
    def mean_chosen(self) -> Tensor:
        """Mean log-probability over the tokens of each chosen completion."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """Mean log-probability over the tokens of each rejected completion."""
        return self.rejected / self.rejected_tokens


def score_pairs(trainer: Any, room: RowRoom, dataset: Any, what: str) -> PairScores:
    """Pass all pairs of a prepared data set through the model, without gradients or dropout.

    Ranks share the work, and each gets the whole result.

    Args:
        trainer: an `ORPOTrainer`.
        room: tokens that a row may have.
        dataset: from `prepare_pairs`.
        what: for the progress bar, which appears after two seconds.
    """
    args, model = trainer.args, trainer.model
    starts = range(args.process_index * _BLOCK, len(dataset), args.world_size * _BLOCK)
    was_training = model.training
    model.eval()
    found: list[tuple[int, Tensor]] = []
    try:
        is_first = args.process_index == 0
        for start in tqdm(starts, desc=what, delay=2.0, leave=False, disable=not is_first):
            pairs = [dataset[i] for i in range(start, min(start + _BLOCK, len(dataset)))]
            found.append((start, _score_block(trainer, room, pairs)))
    finally:
        model.train(was_training)
    if args.world_size > 1:
        from accelerate.utils import gather_object

        found = sorted(gather_object(found), key=lambda block: block[0])
    sums = torch.cat([block for _, block in found]) if found else torch.zeros(0, 2)
    # Not a row at a time: that makes lists of all tokens, minutes for some 100,000 pairs.
    lengths = torch.tensor(list(pair_lengths(dataset)), dtype=torch.int64).reshape(-1, 3)
    return PairScores(
        sums[:, 0],
        sums[:, 1],
        lengths[:, 1],
        lengths[:, 2],
        torch.tensor(list(dataset["row"]) if hasattr(dataset, "column_names") else
                     [row["row"] for row in dataset], dtype=torch.int64),
    )  # fmt: skip


def _score_block(trainer: Any, room: RowRoom, pairs: Sequence[Pair]) -> Tensor:
    device = trainer.args.device

    def plan() -> list[RowBatch]:
        planner = trainer.planner._replace(max_tokens_per_row=room.max_tokens, chosen_only=False)
        return planner.plan(pairs)

    def score(rows: list[RowBatch]) -> Tensor:
        sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
        with torch.no_grad(), step_context(trainer), trainer.accelerator.autocast():
            for row in rows:
                row = row.to(device)
                logps = trainer.model(**row.inputs, score_rows=(row.score_index, row.targets))
                found = completion_logps(logps, row.completion_ids, row.pair_count)
                both = torch.stack([found.chosen, found.rejected], dim=1)
                sums[list(row.pair_numbers)] = both.cpu().double()
        return sums

    return room.make(plan(), score, plan)[0]
