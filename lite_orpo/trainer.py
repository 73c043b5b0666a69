"""ORPOTrainer: a transformers.Trainer whose optimiser step is planned and owned here.

The loop, the schedule, saving, callbacks and launching are transformers' and accelerate's. Ours
is what makes a step: the pairs of the whole optimiser step are planned into row batches, each is
scored through the head seam, and the loss is normalised by the tokens and pairs of the whole
step over all ranks, so that its gradient does not depend on how the step was cut. Preparing
the model is in `setup.py`, rows in `data/`, whether prompts are shared in
`model/prefix_sharing.py`, the formula in `loss.py`.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .checkpointing import CheckpointingTrainer
from .config.orpo_config import ORPOConfig
from .data.prepared_sets import PreparedSets, is_mapping_of_sets
from .data.row_batch import Pair, RowBatch
from .data.step_plan import StepPlan
from .errors import DataError
from .loss import orpo_loss
from .metrics import LossScale, empty_parts, loss_parts, metrics_of_set, named_metrics
from .model.head import attach_scored_head
from .model.host_memory import offloaded_activations
from .out_of_memory import RowRoom
from .ranks import fetch_pairs, own_pair_count, plan_rows
from .row_budget import planner_of
from .row_choice import choose_rows
from .setup import (
    check_launch,
    check_parallelism,
    check_vocabulary,
    length_rule,
    prepare_model,
    resolve_tokenizer,
)
from .step_context import step_context
from .step_guard import StepGuard
from .throughput import Throughput


def _collate_pairs(features: list[Pair]) -> dict[str, list[Pair]]:
    return {"pairs": features}


class ORPOTrainer(CheckpointingTrainer):
    """Trains a causal language model on preference pairs by ORPO (arXiv 2403.07691).

    Args:
        model: a transformers CausalLM, one that PEFT has wrapped, or a name to load.
        args: an `ORPOConfig`; default settings if None.
        train_dataset: rows with `prompt`, `chosen`, `rejected` (text or message lists, the
            prompt may be implicit in message lists): a `datasets.Dataset`, a list of mappings,
            any map-style data set, or a `RowSource`.
        eval_dataset: the same, or a mapping of names to such.
        processing_class: the tokenizer; default: the one that belongs to the model.
        peft_config: put this adapter on the model. Without it, and without an adapter on the
            model already, the whole model trains.
        callbacks: transformers callbacks.
        optimizers: optimizer and scheduler to use instead of the configured ones.
        tokenizer: older name of `processing_class`.

    Raises:
        ModelError: the model, tokenizer or adapter cannot be trained this way.
        DataError: the rows cannot be used; the message says which and why.
    """

    _tag_names = ["lite-orpo", "orpo"]

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        tokenizer: Any = None,
    ) -> None:
        args = ORPOConfig() if args is None else args
        check_launch(args)
        tokenizer = resolve_tokenizer(model, processing_class, tokenizer)
        model = prepare_model(model, args, peft_config)
        check_vocabulary(model, tokenizer)
        self.length_rule = length_rule(model, args)
        self._sets = PreparedSets(tokenizer, self.length_rule, args.on_bad_row)
        self.data_reports = self._sets.reports
        self._scale = LossScale(args.odds_ratio_weight, args.odds_ratio_temperature)
        self.head = attach_scored_head(
            model,
            backend=args.loss_backend,
            workspace_bytes=args.loss_workspace_mib * 2**20,
            device=args.device,
        )
        self.processing_class = tokenizer
        self.args = args
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate_pairs,
            train_dataset=self._sets.prepare("train_dataset", train_dataset),
            eval_dataset=self._sets.prepare_each("eval_dataset", eval_dataset),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_parallelism(self)
        self.equal_rows: bool = self.is_fsdp_enabled
        """Whether all ranks pass as many rows: of a sharded model, they wait for each other."""
        self.head.verify()
        self.sharing, self.rows_description = choose_rows(self)
        self.planner, chosen_budget = planner_of(self)
        self.rows_description += chosen_budget
        self._offloading = offloaded_activations(self.model, args)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        tokens, ranks = self.planner.max_tokens_per_row, args.world_size
        self.room = RowRoom(tokens, "a step", ranks, "set gradient_checkpointing: true")
        self._evaluation_room = RowRoom(tokens, "the evaluation", ranks, "close other programs")
        self._train_parts, self._eval_parts = empty_parts(args.device), empty_parts(args.device)
        self._throughput = Throughput()
        source = self.data_reports[0].source if self.data_reports else "train_dataset"
        self._guard = StepGuard(args.max_refused_steps, source)
        self._eval_counts = torch.zeros(2, device=self.args.device)

    # ---- data ----

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
            eval_dataset = self._sets.prepare("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # ---- the step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Fetch the pairs of one optimiser step and plan their rows.

        Trainer expects as many entries as it asked for; the last one carries the whole step.
        """
        pairs, repeats, fetched = fetch_pairs(self, epoch_iterator, num_batches)
        if fetched == 0:
            return [], None
        nll_tokens, pair_count = self.planner.count_nll_tokens(pairs), len(pairs)
        if self.args.world_size > 1:
            counts = torch.tensor([nll_tokens, pair_count], device=device)
            nll_tokens, pair_count = self.accelerator.reduce(counts, reduction="sum").tolist()
        # Trainer lowers its batch size after an out-of-memory error, if it may; rows follow.
        tokens = self.planner.max_tokens_per_row * self._train_batch_size
        self.room.limit(tokens // self.args.per_device_train_batch_size)
        rows = self._plan_rows(self.room, pairs, repeats)
        step = StepPlan(rows, nll_tokens, pair_count, pairs, repeats)
        return [{}] * (fetched - 1) + [{"step": step}], None

    def _plan_rows(self, room: RowRoom, pairs: list[Pair], repeats: list[Pair]) -> list[RowBatch]:
        planner = self.planner._replace(max_tokens_per_row=room.max_tokens)
        return plan_rows(self, planner, pairs, repeats)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Called again after an out-of-memory error: what the lost steps reported goes with them.
        self._train_parts.zero_()
        self._throughput = Throughput()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one optimiser step's rows; entries without a step do nothing."""
        if "step" not in inputs:
            return torch.zeros((), device=self.args.device)
        self._throughput.begin_step()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        step: StepPlan = inputs["step"]

        def take(rows: list[RowBatch]) -> tuple[Tensor, Tensor]:
            return self._forward_and_backward(model, rows, step.nll_tokens, step.pairs)

        def plan_again() -> list[RowBatch]:
            model.zero_grad(set_to_none=True)  # a failed backward pass leaves some behind
            return self._plan_rows(self.room, step.own_pairs, step.repeats)

        (total, parts), rows = self.room.make(step.rows, take, plan_again)
        if not self._guard.accepts(self, total):
            return self._guard.refuse(self, step.own_pairs, self._is_finite_alone)
        self._train_parts += parts
        self._throughput.end_step(rows, len(step.own_pairs))
        return total * self.args.world_size

    def _is_finite_alone(self, pair: Pair) -> bool:
        with torch.no_grad(), step_context(self), self.compute_loss_context_manager():
            row = self.planner.plan([pair])[0]
            return bool(self._score(self.model, row, 1.0, 1.0)[0].isfinite())

    def _forward_and_backward(
        self, model: nn.Module, rows: list[RowBatch], nll_tokens: float, pairs: float
    ) -> tuple[Tensor, Tensor]:
        """Loss and reported parts of a step's rows; their gradients are in the parameters."""
        total = torch.zeros((), device=self.args.device)
        all_parts = empty_parts(self.args.device)
        with step_context(self):
            for number, row in enumerate(rows):
                # A sharded model reduces each row's gradients: only whole ones could wait.
                reduces = number == len(rows) - 1 or self.equal_rows
                with (
                    self._offloading,
                    nullcontext() if reduces else self.accelerator.no_sync(model),
                ):
                    with self.compute_loss_context_manager():
                        loss, parts = self._score(model, row, nll_tokens, pairs)
                    # DDP averages over ranks, but each rank's loss is its share of the sum.
                    self.accelerator.backward(loss * self.args.world_size)
                total += loss.detach()
                all_parts += parts
        return total, all_parts

    def _score(
        self, model: nn.Module, row: RowBatch, nll_tokens: float, pairs: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of one row batch and its reported parts, over the given normalisers."""
        row = row.to(self.args.device)
        logps = model(**row.inputs, score_rows=(row.score_index, row.targets))
        loss = orpo_loss(
            logps,
            row.completion_ids,
            row.nll_mask,
            pair_count=row.pair_count,
            alpha=self._scale.weight,
            temperature=self._scale.temperature,
            pair_normalizer=pairs,
            nll_normalizer=nll_tokens,
            backend=self.args.loss_backend,
        )
        return loss.loss, loss_parts(loss, pairs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x tokens x parameters for a planned step (the estimate that Trainer uses)."""
        if "step" not in inputs:
            return 0
        tokens = sum(row.tokens for row in inputs["step"].rows)
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "no" or "step" not in inputs:
            return
        counts_padding = self.args.include_num_input_tokens_seen == "all"
        rows = inputs["step"].rows
        tokens = sum(
            row.inputs["input_ids"].numel() if counts_padding else row.tokens for row in rows
        )
        seen = torch.tensor(tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(seen, reduction="sum"))

    # ---- evaluation ----

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """Metrics of another set of raw rows, as `evaluate` computes them; no predictions."""
        prepared = self._sets.prepare("test_dataset", test_dataset)
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
            return self._plan_rows(self._evaluation_room, pairs, repeats)

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
        metrics = metrics_of_set(parts, tokens, pairs, self._scale)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    # ---- reporting ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log line."""
        self._guard.note(logs, self._throughput.steps)
        if "loss" in logs and self._throughput.steps:
            parts = self._sum_over_ranks(self._train_parts)
            averages = (parts / self._throughput.steps).tolist()  # waits for the device
            logs.update(named_metrics(averages, self._scale))
            logs.update(self._throughput.take(self.args.device, self._sum_over_ranks))
            self._train_parts.zero_()
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")
