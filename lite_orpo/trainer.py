"""ORPOTrainer: a transformers.Trainer whose optimiser step is planned and owned here.

The loop, the schedule, saving, callbacks and launching are transformers' and accelerate's. Ours
is what makes a step: the pairs of the whole optimiser step are planned into row batches, each is
scored through the head seam, and the loss is normalised by the tokens and pairs of the whole
step over all ranks, so that its gradient does not depend on how the step was cut. Preparing
the model is in `setup.py`, rows in `data/`, whether prompts are shared in
`model/prefix_sharing.py`, the formula in `losses/`.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .config.orpo_config import ORPOConfig
from .data.prepared_sets import PreparedSets, choose_splits
from .data.row_batch import Pair, RowBatch
from .data.step_plan import StepPlan
from .evaluating import EvaluatingTrainer
from .losses.objective import Objective
from .metrics import empty_parts, loss_parts, named_metrics
from .model.head import attach_scored_head
from .model.host_memory import offloaded_activations
from .notebook_table import shorten_table
from .row_choice import choose_rows
from .setup import (
    check_launch,
    check_parallelism,
    check_vocabulary,
    direct_tensorboard,
    length_rule,
    prepare_model,
    refuse_unused,
    resolve_model,
    resolve_tokenizer,
)
from .step.context import step_context
from .step.guard import StepGuard
from .step.ranks import fetch_pairs, plan_rows
from .step.row_budget import planner_of
from .step.row_room import RowRoom
from .step.throughput import Throughput


def _collate_pairs(features: list[Pair]) -> dict[str, list[Pair]]:
    return {"pairs": features}


class ORPOTrainer(EvaluatingTrainer):
    """Trains a causal language model on pairs, by ORPO (arXiv 2403.07691) or `loss_type`.

    Args:
        model: a transformers CausalLM, one that PEFT has wrapped, or a name to load; default:
            the one that `args.model_name_or_path` names.
        args: an `ORPOConfig`; default settings if None.
        data_collator: None; it has its place because TRL's call has it.
        train_dataset: rows with `prompt`, `chosen`, `rejected` (text or message lists, the
            prompt may be implicit in message lists): a `datasets.Dataset`, a list of mappings,
            any map-style data set, or a `RowSource`; of a DatasetDict, its split "train".
        eval_dataset: the same, or a mapping of names to such; default: where evaluation is asked
            for and `train_dataset` is a DatasetDict, its held-out split.
        processing_class: the tokenizer; default: the one that belongs to the model.
        model_init: makes the model, instead of `model`; called once.
        callbacks: transformers callbacks.
        optimizers: optimizer and scheduler to use instead of the configured ones.
        preprocess_logits_for_metrics: None, as `data_collator`.
        peft_config: put this adapter on the model. Without it, and without an adapter on the
            model already, the whole model trains.
        compute_metrics: None, as `data_collator`.
        tokenizer: older name of `processing_class`.

    Raises:
        ModelError: the model, tokenizer or adapter cannot be trained this way.
        DataError: the rows cannot be used; the message says which and why.
    """

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: None = None,
        peft_config: Any = None,
        compute_metrics: None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        args = ORPOConfig() if args is None else args
        check_launch(args)
        refuse_unused(
            data_collator=data_collator,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        sets = choose_splits(train_dataset, eval_dataset, evaluates=evaluates)
        model = resolve_model(model, args, model_init)
        tokenizer = resolve_tokenizer(model, processing_class, tokenizer)
        model = prepare_model(model, args, peft_config)
        check_vocabulary(model, tokenizer)
        self.length_rule = length_rule(model, args)
        self._sets = PreparedSets(tokenizer, self.length_rule, args.on_bad_row)
        self.data_reports = self._sets.reports
        self.objective = Objective.of(args)
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
            train_dataset=self._sets.prepare("train_dataset", sets.train),
            eval_dataset=self._sets.prepare_each("eval_dataset", sets.held_out),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.given_optimizer = self.optimizer  # None: the configured one
        check_parallelism(self)
        direct_tensorboard(self)
        shorten_table(self)
        self.equal_rows: bool = self.is_fsdp_enabled
        """Whether all ranks pass as many rows: of a sharded model, they wait for each other."""
        self.head.verify()
        self.sharing, self.rows_description = choose_rows(self)
        self.planner, chosen_budget = planner_of(self)
        self.rows_description += chosen_budget
        self._offloading = offloaded_activations(self.model, args)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(["lite-orpo", args.loss_type])
        tokens, ranks = self.planner.max_tokens_per_row, args.world_size
        self.room = RowRoom(tokens, "a step", ranks, "set gradient_checkpointing: true")
        self._prepare_evaluation()
        self._train_parts = empty_parts(args.device)
        self._throughput = Throughput()
        source = self.data_reports[0].source if self.data_reports else "train_dataset"
        self._guard = StepGuard(args.max_refused_steps, source)

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
        loss = self.objective.of_row(
            logps,
            row,
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

    # ---- reporting ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log line."""
        self._guard.note(logs, self._throughput.steps)
        if "loss" in logs and self._throughput.steps:
            parts = self._sum_over_ranks(self._train_parts)
            averages = (parts / self._throughput.steps).tolist()  # waits for the device
            has_rejected = not self.planner.chosen_only
            logs.update(named_metrics(averages, self.objective, has_rejected=has_rejected))
            logs.update(self._throughput.take(self.args.device, self._sum_over_ranks))
            self._train_parts.zero_()
        if "train_runtime" in logs and self._reference.seconds:
            logs["lite_orpo/reference_seconds"] = self._reference.seconds
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")
