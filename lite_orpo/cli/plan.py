"""`lite-orpo plan`: what a run will take, whether it fits, and what to lower if it does not.

Nothing of the model is loaded but its configuration; the pairs are tokenised, because the longest
row decides.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.loss_types import LOSS_TYPES
from ..config.run_config import RunConfig, load_run_config
from ..config.yaml_file import Setting, read_settings
from ..data.largest_row import largest_row, longest_pair
from ..data.preparation import prepare_pairs
from ..data.row_batch import RowBatch
from ..data.step_plan import RowPlanner
from ..errors import ConfigError, ModelError
from ..memory.plan import MemoryPlan, plan_of_twin, row_tokens_that_fit, twin_of_run
from ..model.load import load_tokenizer
from ..model.meta_twin import MetaTwin
from ..row_choice import expects_packed_rows
from ..setup import length_rule
from ..step.row_budget import most_tokens
from .train import open_sources, quiet_libraries

GIB = 2**30
# What a CUDA process takes before the first tensor, and what the allocator cannot use.
CONTEXT_BYTES = int(0.5 * GIB)
FRAGMENTATION = 1.05


class _Change(NamedTuple):
    """A setting that takes less memory."""

    text: str
    training: dict[str, Any]
    model: dict[str, Any] | None = None


def show_plan(path: Path, overrides: dict[str, Setting], vram: float | None) -> None:
    """Print the plan of a run.

    Args:
        path: the YAML file.
        overrides: settings from the command line.
        vram: memory of the card in GiB; None: of the one that is here, where there is one.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    if vram is not None and not 0 < vram < float("inf"):
        raise ConfigError(f"--vram must be a positive number of GiB, found {vram:g}")
    console = Console()
    quiet_libraries(console)
    config, device = _config_for(path, overrides, is_for_a_card=vram is not None)
    limit = _limit(vram, device)
    plans = _Plans(config, device, limit)
    with console.status("Passing a row without data through the model's layers"):
        planned = plans.of(config)
    _print_plan(console, config, planned, device)
    if limit is None:
        console.print("Give --vram GIB to see whether it fits on a card.")
        return
    needed = on_the_card(planned.memory)
    if needed <= limit:
        console.print(
            Text(f"Fits in {limit / GIB:g} GiB, with {(limit - needed) / GIB:.1f} GiB to spare "
                 "(computed, not measured).", style="bold green"), soft_wrap=True)  # fmt: skip
        return
    console.print(
        Text(f"Does not fit in {limit / GIB:g} GiB: {needed / GIB:.1f} GiB are needed (computed, "
             "not measured).", style="bold red"), soft_wrap=True)  # fmt: skip
    _print_advice(console, config, plans, planned, limit)


def _config_for(
    path: Path, overrides: dict[str, Setting], *, is_for_a_card: bool
) -> tuple[RunConfig, torch.device]:
    """The configuration and the device that the run is planned for.

    For a card that is not here, settings that only a GPU can have are kept from the checks of
    this machine, and those that follow the device are as a GPU with bf16 would make them.
    """
    if not is_for_a_card or torch.cuda.is_available():
        config = load_run_config(path, overrides)
        return config, config.training.device
    where = f"planned for a card (--vram), {path}"
    written = {**read_settings(path), **overrides}
    halves: dict[str, Any] = {
        name: written[name].value for name in ("bf16", "fp16") if name in written
    }
    unset: dict[str, Setting] = {name: Setting(None, where) for name in halves}
    config = load_run_config(path, {**overrides, **unset})
    bf16, fp16 = bool(halves.get("bf16")), bool(halves.get("fp16"))
    settings: dict[str, Any] = {"bf16": bf16 or (not fp16 and "bf16" not in halves), "fp16": fp16}
    if not {"gradient_checkpointing", "activation_checkpointing"} & set(config.given):
        settings["gradient_checkpointing"] = True
    model = config.model
    if model.dtype == "auto":
        half = "float16" if fp16 else "bfloat16"
        model = replace(model, dtype=half if config.lora.use_peft else "float32")
    changed = config._replace(model=model, training=_with(config.training, **settings))
    return changed, torch.device("cuda")


class _Planned(NamedTuple):
    """A plan, the row that it is for, and the budget of rows in tokens."""

    memory: MemoryPlan
    row: RowBatch
    max_tokens: int


class _Plans:
    """Plans of one run's pairs under changing settings."""

    def __init__(self, config: RunConfig, device: torch.device, limit: float | None) -> None:
        args = config.training
        twin = twin_of_run(config.model, config.lora, args, device)
        rule = length_rule(twin.model, args)
        source = open_sources(config).train
        tokenizer = load_tokenizer(config.model)
        self._pairs = prepare_pairs(source, tokenizer, rule, args.on_bad_row).dataset
        self._max_length = rule.max_length
        self.device = device
        self._limit = limit

    def of(self, config: RunConfig) -> _Planned:
        """The plan of a configuration; with `max_tokens_per_row: auto`, of what fits best."""
        args = config.training
        twin = twin_of_run(config.model, config.lora, args, self.device)
        planner = self._planner(config, twin)
        in_step = args.per_device_train_batch_size * args.gradient_accumulation_steps

        def row_of(tokens: int) -> RowBatch:
            return largest_row(planner._replace(max_tokens_per_row=tokens), self._pairs, in_step)

        def plan_for(tokens: int) -> MemoryPlan:
            return plan_of_twin(twin, args, row_of(tokens), self.device)

        def fits(plan: MemoryPlan) -> bool:
            return self._limit is None or on_the_card(plan) <= self._limit

        if args.max_tokens_per_row != "auto":
            tokens = int(args.max_tokens_per_row)
            return _Planned(plan_for(tokens), row_of(tokens), tokens)
        least = longest_pair(planner, self._pairs)
        tokens, memory = row_tokens_that_fit(plan_for, fits, planner.max_tokens_per_row, least)
        return _Planned(memory, row_of(tokens), tokens)

    def longest_pair(self, config: RunConfig) -> int:
        """Positions of the longest pair's own row."""
        twin = twin_of_run(config.model, config.lora, config.training, self.device)
        return longest_pair(self._planner(config, twin), self._pairs)

    def _planner(self, config: RunConfig, twin: MetaTwin) -> RowPlanner:
        shares = expects_packed_rows(twin.model, config.training, self._max_length)
        most = most_tokens(self.device.type)
        rejected = LOSS_TYPES[config.training.loss_type].uses_rejected
        return RowPlanner(0, str(config.training.nll_tokens), most, shares, not rejected)


def _positions(row: RowBatch) -> int:
    return int(row.inputs["input_ids"].numel())


def _limit(vram: float | None, device: torch.device) -> float | None:
    if vram is not None:
        return vram * GIB
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return None


def on_the_card(plan: MemoryPlan) -> float:
    """Bytes of a card that the plan needs, with what CUDA and its allocator take for themselves."""
    return plan.total * FRAGMENTATION + CONTEXT_BYTES


def _print_plan(
    console: Console, config: RunConfig, planned: _Planned, device: torch.device
) -> None:
    layout = "packed" if "tree_spans" in planned.row.inputs else "padded"
    chosen = ""
    if config.training.max_tokens_per_row == "auto":
        chosen = f"; max_tokens_per_row: auto takes {planned.max_tokens:,}"
    console.print(
        f"{config.model.model_name_or_path} on {device.type}; the largest row: "
        f"{planned.row.pair_count} pairs, {_positions(planned.row):,} tokens, {layout}{chosen}",
        soft_wrap=True,
    )
    table = Table("", "MiB", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for item in planned.memory.items:
        size = Text(f"{item.size / 2**20:,.0f}", style="dim" if item.is_on_host else "")
        note = f"{item.note} (not counted)" if item.is_on_host else item.note
        table.add_row(item.name, size, Text(note.strip(), style="dim"))
    highest = f"{planned.memory.total / 2**20:,.0f}"
    table.add_row(
        Text("at its highest", style="bold"), highest,
        Text("the backward pass's needs and the larger of the last two", style="dim"),
    )  # fmt: skip
    console.print(table)


def _print_advice(
    console: Console,
    config: RunConfig,
    plans: _Plans,
    planned: _Planned,
    limit: float,
) -> None:
    console.print("What to change, least harm first, each with those above it:")
    # From here on the budget of rows is one of the things to change.
    config = _changed(config, training={"max_tokens_per_row": planned.max_tokens})
    before = on_the_card(planned.memory)
    for change in _changes(config, plans):
        tried = _changed(config, change.training, change.model)
        try:
            with console.status(f"Trying {change.text}"):
                needed = on_the_card(plans.of(tried).memory)
        except ModelError:
            continue  # not for this model: an embedding that is the head too
        if needed > 0.98 * before:
            continue  # not worth what it costs
        before, config = needed, tried
        verdict = "fits" if needed <= limit else "does not fit yet"
        console.print(f"  {change.text}: {needed / GIB:.1f} GiB, {verdict}", soft_wrap=True)
        if needed <= limit:
            return
    console.print("  a shorter max_length, or a smaller model")


def _changes(config: RunConfig, plans: _Plans) -> Iterator[_Change]:
    """Settings that take less memory, those first that change nothing of the result."""
    args = config.training
    if not args.is_checkpointing:
        yield _Change(
            "gradient_checkpointing: true (a third more time)", {"gradient_checkpointing": True}
        )
    tokens = int(args.max_tokens_per_row)
    longest = plans.longest_pair(config)
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield _Change(
            f"max_tokens_per_row: {tokens} (the same result, slower)",
            {"max_tokens_per_row": tokens},
        )
    if plans.device.type == "cuda":
        yield _Change(
            "offload_embedding: true (the same result, a little slower)",
            {"offload_embedding": True},
        )
        if find_spec("trl") is not None:
            yield _Change(
                "activation_offloading: true (the same result, slower)",
                {"activation_offloading": True},
            )
    if find_spec("bitsandbytes") is None:
        return
    if "8bit" not in str(getattr(args.optim, "value", args.optim)):
        yield _Change("optim: adamw_8bit", {"optim": "adamw_8bit"})
    if config.lora.use_peft and not config.model.load_in_4bit:
        yield _Change(
            "load_in_4bit: true (a base model rounded to 4 bits)",
            {},
            {"load_in_4bit": True, "load_in_8bit": False},
        )


def _changed(
    config: RunConfig, training: dict[str, Any], model: dict[str, Any] | None = None
) -> RunConfig:
    return config._replace(
        training=_with(config.training, **training), model=replace(config.model, **(model or {}))
    )


def _with(args: Any, **settings: Any) -> Any:
    """The same arguments with some of them changed, without resolving them anew."""
    import copy

    changed = copy.copy(args)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
