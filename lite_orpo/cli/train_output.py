"""What `lite-orpo train` prints: the start, the samples, the outcome, and how to go on."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lite_orpo_kernels import select_backend

from ..config.run_config import RunConfig
from ..model.adapter import model_device
from ..report.card import RESULTS
from ..report.samples import Answered
from ..step.guard import REFUSED_STEPS


def print_start(
    console: Console, config: RunConfig, trainer: Any, parameters: tuple[int, int]
) -> None:
    """Say what is about to be trained, on what, and how the loss is computed."""
    trainable, total = parameters
    args = config.training
    device = model_device(trainer.model)
    dtype = str(trainer.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if getattr(trainer.model, "is_loaded_in_4bit", False):
        dtype += ", linear layers in 4 bits"
    elif getattr(trainer.model, "is_loaded_in_8bit", False):
        dtype += ", linear layers in 8 bits"
    backend = select_backend(device, args.loss_backend)
    head = f"fused ({backend.name})" if trainer.head.is_fused else "full logits"
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = [
        ("Model", f"{config.model.model_name_or_path} on {device}, {dtype}"),
        (
            "Trains",
            f"{_count(trainable)} of {_count(total)} parameters "
            + ("(LoRA)" if config.lora.use_peft else "(all weights)"),
        ),
        *(("Data", line) for report in trainer.data_reports for line in report.lines()[:1]),
        ("Step", f"{pairs} pairs, loss {trainer.objective.in_words()}, head {head}"),
        ("Rows", trainer.rows_description),
    ]
    for label, text in rows:
        console.print(Text(f"{label:>10} ", style="bold cyan") + Text(text), soft_wrap=True)


def print_samples(console: Console, answered: list[Answered]) -> None:
    """Show each prompt with its answers before and after."""
    for item in answered:
        text = Text()
        text.append("before  ", style="bold red")
        text.append(item.before + "\n")
        text.append("after   ", style="bold green")
        text.append(item.after)
        console.print(
            Panel(text, title=Text(_shorten(item.prompt)), title_align="left", expand=True)
        )


def print_outcome(
    console: Console, before: dict[str, float], after: dict[str, float], seconds: float
) -> None:
    """Show the held-out figures before and after."""
    if after:
        table = Table("held-out", "before", "after", title_justify="left")
        for key, label in RESULTS:
            if key in after:
                old = f"{before[key]:.3f}" if key in before else "-"
                table.add_row(label, old, f"{after[key]:.3f}")
        console.print(table)
    console.print(f"Finished in {seconds:.0f} s.")


def print_refused(console: Console, lines: Iterable[Mapping[str, Any]]) -> None:
    """Say how many steps of a run were not taken, if there were any.

    Args:
        console: where to.
        lines: of the run's metrics file.
    """
    count = sum(line.get(REFUSED_STEPS, 0) for line in lines)
    if count:
        steps = "1 step was" if count == 1 else f"{count} steps were"
        console.print(
            f"{steps} not taken, for a loss or gradient that was not finite; the warnings above "
            "name the rows.",
            soft_wrap=True,
        )


def print_usage(
    console: Console, config: RunConfig, output_dir: Path, metrics: str, curves: str | None
) -> None:
    """Say where everything is and how to use it."""
    what = "Adapter" if config.lora.use_peft else "Model"
    console.print(f"{what} in {output_dir}, figures in {output_dir / metrics}", soft_wrap=True)
    if config.report.save_plots and curves is not None:
        console.print(f"Curves in {output_dir / curves}", soft_wrap=True)
    console.print("Look at it:")
    for line in (f"lite-orpo eval {output_dir}", f"lite-orpo chat {output_dir} --compare"):
        if config.lora.use_peft or "--compare" not in line:
            console.print(Text("    " + line), soft_wrap=True)
    console.print("Use it in Python:")
    name = "AutoPeftModelForCausalLM" if config.lora.use_peft else "AutoModelForCausalLM"
    package = "peft" if config.lora.use_peft else "transformers"
    lines = [
        f"from {package} import {name}",
        "from transformers import AutoTokenizer",
        f'model = {name}.from_pretrained("{output_dir}")',
    ]
    base = Path(str(config.model.model_name_or_path)).expanduser()
    if config.lora.use_peft and base.is_absolute():
        # Its path is not in the adapter's folder.
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{output_dir}")',
        ]
    for line in (*lines, f'tokenizer = AutoTokenizer.from_pretrained("{output_dir}")'):
        console.print(Text("    " + line), soft_wrap=True)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _shorten(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
