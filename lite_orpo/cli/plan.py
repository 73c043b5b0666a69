"""`lite-orpo plan`: what a run will take, whether it fits, and what to lower if it does not.

Nothing of the model is loaded but its configuration; the pairs are tokenised, because the longest
row decides.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.run_config import RunConfig, load_run_config
from ..config.yaml_file import Setting
from ..data.preparation import LengthRule, prepare_pairs
from ..data.row_batch import PlannedPair, RowBatch
from ..data.step_plan import RowPlanner
from ..errors import ConfigError
from ..memory_plan import MemoryPlan, may_share_prefixes, plan_memory
from ..model.load import load_tokenizer
from .train import open_sources, quiet_libraries

GIB = 2**30
# What a CUDA process takes before the first tensor, and what the allocator cannot use.
CONTEXT_BYTES = int(0.5 * GIB)
FRAGMENTATION = 1.05


class _Change(NamedTuple):
    """A setting that takes less memory."""

    text: str
    config: RunConfig


def show_plan(path: Path, overrides: dict[str, Setting], vram: float | None) -> None:
    """Print the plan of a run.

    Args:
        path: the YAML file.
        overrides: settings from the command line.
        vram: memory of the card in GiB; None: of the one that is here, where there is one.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    if vram is not None and not vram > 0:
        raise ConfigError(f"--vram must be a positive number of GiB, found {vram:g}")
    console = Console()
    quiet_libraries(console)
    config = load_run_config(path, overrides)
    device = config.training.device
    if vram is not None and device.type != "cuda":
        device, config = torch.device("cuda"), _as_on_a_gpu(config)
    pairs = _pairs(config)
    with console.status("Passing a row without data through the model's layers"):
        plan, row = _plan(config, pairs, device)
    _print_plan(console, config, plan, row, device)
    limit = _limit(vram, device)
    if limit is None:
        console.print("Give --vram GIB to see whether it fits on a card.")
        return
    needed = on_the_card(plan)
    if needed <= limit:
        console.print(
            Text(f"Fits in {limit / GIB:g} GiB, with {(limit - needed) / GIB:.1f} GiB to spare "
                 "(computed, not measured).", style="bold green"), soft_wrap=True)  # fmt: skip
        return
    console.print(
        Text(f"Does not fit in {limit / GIB:g} GiB: {needed / GIB:.1f} GiB are needed (computed, "
             "not measured).", style="bold red"), soft_wrap=True)  # fmt: skip
    _print_advice(console, config, pairs, device, limit)


def _as_on_a_gpu(config: RunConfig) -> RunConfig:
    """What a GPU with bf16 would make of the settings that follow the device."""
    settings: dict[str, Any] = {}
    if not {"bf16", "fp16"} & set(config.given):
        settings["bf16"] = True
    if not {"gradient_checkpointing", "activation_checkpointing"} & set(config.given):
        settings["gradient_checkpointing"] = True
    model = config.model
    if model.dtype == "auto":
        model = replace(model, dtype="bfloat16" if config.lora.use_peft else "float32")
    return config._replace(model=model, training=_with(config.training, **settings))


def _pairs(config: RunConfig) -> Any:
    args = config.training
    rule = LengthRule(args.max_length, args.overlong_rows)
    source = open_sources(config).train
    return prepare_pairs(source, load_tokenizer(config.model), rule, args.on_bad_row).dataset


def _plan(config: RunConfig, pairs: Any, device: torch.device) -> tuple[MemoryPlan, RowBatch]:
    row = _largest_row(config, pairs)
    return plan_memory(config.model, config.lora, config.training, row, device), row


def _largest_row(config: RunConfig, pairs: Any) -> RowBatch:
    args = config.training
    shares = may_share_prefixes(config.model, config.lora, args)
    planner = RowPlanner(0, args.nll_tokens, args.max_tokens_per_row, shares)
    in_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    largest: RowBatch | None = None
    for start in range(0, len(pairs), in_step):
        step = [pairs[i] for i in range(start, min(start + in_step, len(pairs)))]
        for row in planner.plan(step):
            if largest is None or _positions(row) > _positions(largest):
                largest = row
    assert largest is not None  # a source without rows has been refused
    return largest


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
    console: Console, config: RunConfig, plan: MemoryPlan, row: RowBatch, device: torch.device
) -> None:
    layout = "packed" if "tree_spans" in row.inputs else "padded"
    console.print(
        f"{config.model.model_name_or_path} on {device.type}; the largest row: {row.pair_count} "
        f"pairs, {_positions(row):,} tokens, {layout}",
        soft_wrap=True,
    )
    table = Table("", "MiB", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for item in plan.items:
        table.add_row(item.name, f"{item.size / 2**20:,.0f}", Text(item.note, style="dim"))
    table.add_row(Text("at its highest", style="bold"), f"{plan.total / 2**20:,.0f}", "")
    console.print(table)


def _print_advice(
    console: Console, config: RunConfig, pairs: Any, device: torch.device, limit: float
) -> None:
    console.print("What to change, least harm first, each with those above it:")
    before = on_the_card(_plan(config, pairs, device)[0])
    for change in _changes(config, pairs):
        with console.status(f"Trying {change.text}"):
            plan, _ = _plan(change.config, pairs, device)
        needed = on_the_card(plan)
        if needed > 0.98 * before:
            continue  # not worth what it costs
        before = needed
        fits = needed <= limit
        verdict = "fits" if fits else "does not fit yet"
        console.print(f"  {change.text}: {needed / GIB:.1f} GiB, {verdict}", soft_wrap=True)
        if fits:
            return
    console.print("  a shorter max_length, or a smaller model")


def _changes(config: RunConfig, pairs: Any) -> Iterator[_Change]:
    """Settings that take less memory, each on top of those before it."""
    args = config.training
    if not args.is_checkpointing:
        config = config._replace(training=_with(args, gradient_checkpointing=True))
        yield _Change("gradient_checkpointing: true (a third more time)", config)
    planned = [PlannedPair.of(pair) for pair in pairs]
    if may_share_prefixes(config.model, config.lora, args):
        longest = max(pair.tree_tokens for pair in planned)
    else:
        longest = max(2 * pair.longest for pair in planned)
    tokens = args.max_tokens_per_row
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        config = config._replace(training=_with(config.training, max_tokens_per_row=tokens))
        yield _Change(f"max_tokens_per_row: {tokens} (the same result, slower)", config)
    if "8bit" not in str(getattr(args.optim, "value", args.optim)):
        config = config._replace(training=_with(config.training, optim="adamw_8bit"))
        yield _Change("optim: adamw_8bit", config)
    if config.lora.use_peft and not config.model.load_in_4bit:
        config = config._replace(model=replace(config.model, load_in_4bit=True))
        yield _Change("load_in_4bit: true (a base model rounded to 4 bits)", config)


def _with(args: Any, **settings: Any) -> Any:
    """The same arguments with some of them changed, without resolving them anew."""
    import copy

    changed = copy.copy(args)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
