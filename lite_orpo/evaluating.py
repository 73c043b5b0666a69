"""EvaluatingTrainer: figures of a whole held-out set, exact for any batch size and any ranks.

Sums over tokens and pairs are collected batch by batch, and divided once at the end; each pair's
own figures come from `pair_scores.py`. The trainer's step is in `trainer.py`.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.one_writer import only_writer
from .checkpointing import CheckpointingTrainer
from .data.prepared_sets import PreparedSets, is_mapping_of_sets
from .data.row_batch import RowBatch
from .data.step_plan import RowPlanner
from .errors import DataError
from .losses.objective import Objective
from .metrics import empty_parts, metrics_of_set
from .pair_scores import PairScores, score_pairs
from .reference import Reference
from .step.context import step_context
from .step.ranks import own_pair_count, plan_rows
from .step.row_room import RowRoom
from .step.throughput import Throughput


class EvaluatingTrainer(CheckpointingTrainer):
    """The part of `ORPOTrainer` that evaluates; how a row is scored is the step's (`_score`)."""

    planner: RowPlanner
    objective: Objective
    eval_dataset: Any
    train_dataset: Any
    _sets: PreparedSets
    _throughput: Throughput

    def _prepare_evaluation(self) -> None:
        tokens, ranks = self.planner.max_tokens_per_row, self.args.world_size
        self._evaluation_room = RowRoom(tokens, "the evaluation", ranks, "close other programs")
        self._eval_parts = empty_parts(self.args.device)
        self._eval_counts = torch.zeros(2, device=self.args.device)
        self._reference = Reference(self._evaluation_room)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see `CheckpointingTrainer.train`. A reference scores all pairs before it.

        Raises:
            CheckpointError: another process trains into `output_dir`; or as there.
        """
        writes = self.is_world_process_zero() and self.args.save_strategy != "no"
        with only_writer(Path(self.args.output_dir)) if writes else nullcontext():
            self.train_dataset = self._reference.on(self, self.train_dataset)
            self.eval_dataset = self._reference.on(self, self.eval_dataset)
            self._reference.begin_training(self)
            return super().train(resume_from_checkpoint, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on the held-out pairs, or on other raw rows given here.

        Returns:
            `eval_loss` and TRL's metrics with the prefix, exact over the set: for any batch
            size and number of ranks, each token and each pair counts once.
        """
        if is_mapping_of_sets(eval_dataset):
            metrics: dict[str, float] = {}
            for name, rows in eval_dataset.items():
                metrics.update(self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is None and self.eval_dataset is None:
            raise DataError("evaluate() needs held-out pairs: give the trainer an eval_dataset")
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._reference.on(
                self, self._sets.prepare("eval_dataset", eval_dataset)
            )
        self.eval_dataset = self._reference.on(self, self.eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def score_pairs(self, dataset: Any = None) -> PairScores:
        """Log-probabilities of each pair by the model as it stands.

        Args:
            dataset: raw rows or what `prepare_pairs` made of them; default: the `eval_dataset`.

        Raises:
            DataError: there are no pairs.
        """
        if dataset is None:
            dataset = self.eval_dataset
        prepared = self._sets.prepare("eval_dataset", dataset)
        if prepared is None or is_mapping_of_sets(prepared):
            raise DataError("score_pairs() needs one set of pairs: give it, or an eval_dataset")
        return score_pairs(self, self._evaluation_room, prepared, "Scoring")

    def leave_out_of_throughput(self, seconds: float) -> None:
        """Time between two steps that was spent on something else than training."""
        self._throughput.leave_out(seconds)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """Metrics of another set of raw rows, as `evaluate` computes them; no predictions."""
        prepared = self._reference.on(self, self._sets.prepare("test_dataset", test_dataset))
        return super().predict(prepared, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Add one batch's sums; the figures are made when the whole set is through."""
        own = own_pair_count(self, len(inputs["pairs"]))
        pairs, repeats = inputs["pairs"][:own], inputs["pairs"][own:]

        def plan() -> list[RowBatch]:
            planner = self.planner._replace(
                max_tokens_per_row=self._evaluation_room.max_tokens, chosen_only=False
            )
            return plan_rows(self, planner, pairs, repeats)

        def score(rows: list[RowBatch]) -> Tensor:
            parts = empty_parts(self.args.device)
            with torch.no_grad(), step_context(self):
                for row in rows:
                    with self.compute_loss_context_manager():
                        parts += self._score(model, row, nll_tokens=1.0, pairs=1.0)[1]
            return parts

        self._eval_parts += self._evaluation_room.make(plan(), score, plan)[0]
        counts = [self.planner.count_nll_tokens(pairs), len(pairs)]
        self._eval_counts += torch.tensor(counts, device=self._eval_counts.device)
        # Trainer wants a batch loss; the figures of the whole set are made below.
        return torch.zeros((), device=self.args.device), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's loop, with the exact figures of the whole set put in."""
        self._eval_parts.zero_()
        # fp64 where there is any: counts beyond 2^24 must stay exact.
        self._eval_counts = empty_parts(self.args.device)[:2]
        started = time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._throughput.leave_out(time.perf_counter() - started)
        parts = self._sum_over_ranks(self._eval_parts)
        tokens, pairs = self._sum_over_ranks(self._eval_counts).tolist()
        metrics = metrics_of_set(parts, tokens, pairs, self.objective)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output
