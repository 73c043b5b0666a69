"""Entry point of `lite-orpo`: names the commands, and turns a user's mistake into one line.

Each command's module is imported when that command runs; torch and transformers take seconds.
"""

import os
import sys
from pathlib import Path

import typer

from ..config.options import common_keys
from ..errors import UserError

app = typer.Typer(
    name="lite-orpo",
    help="Preference training by ORPO: a base model and a file of pairs in, a LoRA adapter out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}
_TRAIN_EPILOG = (
    "Common keys (any key of transformers.TrainingArguments works too):\n\n"
    + "\n\n".join(f"[bold]{name}[/bold]  {text}" for name, text in common_keys())
)

_TARGET_HELP = "a run's folder, an adapter, a model (folder or hub name), or a configuration"
# What several commands take.
_CONFIG_AND_SETTINGS = typer.Argument(
    None,
    metavar="CONFIG.yaml [key=value | --key value]...",
    help="the configuration, then settings that override it",
    show_default=False,
)
_CONFIG_OPTION = typer.Option(None, "--config", help="the configuration, as an option")
_BASE_OPTION = typer.Option(
    None, "--base", help="base model; default: the one that the run, or the adapter, names"
)
_COLUMN_MAPPING = typer.Option(
    None,
    "--column-mapping",
    "--column_mapping",
    metavar="YAML",
    help="columns that have other names: '{prompt: question, chosen: good, rejected: bad}'",
)


@app.command(context_settings=_ANY_KEY, epilog=_TRAIN_EPILOG)
def train(
    arguments: list[str] = _CONFIG_AND_SETTINGS,
    config: Path | None = _CONFIG_OPTION,
    resume: bool = typer.Option(
        False, "--resume", help="go on from the newest complete checkpoint in output_dir"
    ),
    stop_after: str | None = typer.Option(
        None, "--stop-after", help="stop with a checkpoint after so long: 45m, 1h30m, 90s"
    ),
) -> None:
    """Train on preference pairs, as a YAML configuration says."""
    from ..config.yaml_file import read_settings
    from .overrides import RESUME, refuse_twice, split_arguments
    from .stopped import seconds_of

    path, overrides = split_arguments(arguments or [], config)
    if resume:
        refuse_twice(overrides)
        overrides |= RESUME
    seconds = None if stop_after is None else seconds_of(stop_after)
    read_settings(path)  # a wrong path is told before the seconds that the libraries take

    from .train import run_training

    sys.exit(run_training(path, overrides, stop_after=seconds))


@app.command(context_settings=_ANY_KEY)
def plan(
    arguments: list[str] = _CONFIG_AND_SETTINGS,
    config: Path | None = _CONFIG_OPTION,
    vram: float | None = typer.Option(
        None, "--vram", help="memory of the card in GiB; default: of the one that is here"
    ),
) -> None:
    """Show what memory a run will take, before anything is loaded."""
    from ..config.yaml_file import read_settings
    from .overrides import split_arguments

    path, overrides = split_arguments(arguments or [], config)
    read_settings(path)

    from .plan import show_plan

    show_plan(path, overrides, vram)


@app.command()
def check(
    data: str = typer.Argument(
        ...,
        metavar="DATA|CONFIG.yaml",
        help="preference pairs (a file, a folder, a hub name), or a configuration that names them",
    ),
    held_out: str | None = typer.Option(None, "--eval", help="held-out pairs to compare with"),
    model: str | None = typer.Option(
        None, "--model", help="count in this model's tokens; without it, in characters"
    ),
    max_length: int | None = typer.Option(
        None, "--max-length", "--max_length", help="as in the configuration; default 1024"
    ),
    overlong_rows: str | None = typer.Option(
        None, "--overlong-rows", "--overlong_rows", help="drop or cut_prompt; default drop"
    ),
    by: str | None = typer.Option(
        None, "--by", help="column to count rows by; default: source or category, if there is one"
    ),
    show: str | None = typer.Option(
        None,
        "--show",
        metavar="N",
        help="show the tokens of line (or row) N, and nothing else; in a folder of files, of "
        "a row such as 'train-00001-of-00002.parquet row 3'",
    ),
    output: Path = typer.Option(
        Path("check"), "--output", "-o", help="folder for check.html and check.json"
    ),
    split: str | None = typer.Option(None, "--split", help="split of a folder or hub data set"),
    eval_split: str | None = typer.Option(
        None, "--eval-split", "--eval_split", help="the same of the held-out pairs"
    ),
    column_mapping: str | None = _COLUMN_MAPPING,
    strict: bool = typer.Option(False, "--strict", help="exit 1 if a finding is serious"),
) -> None:
    """Look at preference pairs before training: what the model will see, and what is wrong."""
    from .check_target import resolve_target

    target = resolve_target(
        data,
        held_out=held_out,
        model=model,
        max_length=max_length,
        overlong_rows=overlong_rows,
        split=split,
        eval_split=eval_split,
        column_mapping=column_mapping,
    )
    if show is not None:
        from .show_row import show_row

        show_row(target, show)
        return
    from .check import run_check

    if run_check(target, by=by, output=output) and strict:
        raise typer.Exit(1)


@app.command(name="eval", context_settings=_ANY_KEY)
def evaluate(
    arguments: list[str] = typer.Argument(
        None,
        metavar="TARGET [key=value | --key value]...",
        help=f"{_TARGET_HELP}; then settings",
        show_default=False,
    ),
    data: str | None = typer.Option(
        None, "--data", help="held-out pairs; default: those of the run"
    ),
    base: str | None = _BASE_OPTION,
    by: str | None = typer.Option(
        None, "--by", help="column to group by; default: source or category, if there is one"
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", help="folder for eval.json and eval.png; default: TARGET's"
    ),
    split: str | None = typer.Option(None, "--split", help="split of a folder or hub data set"),
    column_mapping: str | None = _COLUMN_MAPPING,
) -> None:
    """Score held-out pairs with the adapter on and off: accuracy, margins, NLL, with intervals."""
    from .overrides import split_words

    (target,), overrides = split_words(arguments or [], ("TARGET",))

    from .evaluate import EvalOptions, run_evaluation

    options = EvalOptions(data, base, by, output, split, column_mapping)
    run_evaluation(target, overrides, options)


@app.command(context_settings=_ANY_KEY)
def chat(
    arguments: list[str] = typer.Argument(
        None,
        metavar="TARGET [key=value | --key value]...",
        help=f"{_TARGET_HELP}; then settings",
        show_default=False,
    ),
    compare: bool = typer.Option(False, "--compare", help="base and adapter side by side"),
    system: str | None = typer.Option(None, "--system", help="system message"),
    max_new_tokens: int = typer.Option(
        512, "--max-new-tokens", "--max_new_tokens", help="length of an answer"
    ),
    temperature: float = typer.Option(0.7, "--temperature", help="0 is greedy"),
    seed: int = typer.Option(0, "--seed", help="of the draws"),
    base: str | None = _BASE_OPTION,
) -> None:
    """Talk with a model in the terminal; --compare shows what the adapter changes."""
    from .overrides import split_words

    (target,), overrides = split_words(arguments or [], ("TARGET",))

    from .chat import ChatOptions, run_chat

    options = ChatOptions(compare, system, max_new_tokens, temperature, seed, base)
    run_chat(target, overrides, options)


@app.command(context_settings=_ANY_KEY)
def generate(
    arguments: list[str] = typer.Argument(
        None,
        metavar="TARGET PROMPTS [key=value | --key value]...",
        help=f"{_TARGET_HELP}; the file of prompts; then settings",
        show_default=False,
    ),
    form: str = typer.Option(
        ..., "--format", help="alpaca_eval (rows with `instruction`) or mt_bench (`turns`)"
    ),
    output: Path = typer.Option(..., "--output", "-o", help="the file of answers"),
    batch_size: int = typer.Option(8, "--batch-size", "--batch_size", help="prompts at a time"),
    max_new_tokens: int | None = typer.Option(
        None,
        "--max-new-tokens",
        "--max_new_tokens",
        help="length of an answer; default 2048 (alpaca_eval), 1024 (mt_bench)",
    ),
    temperature: float | None = typer.Option(
        None, "--temperature", help="0 is greedy; default 0, for mt_bench by category"
    ),
    seed: int = typer.Option(0, "--seed", help="of the draws; each prompt has its own from it"),
    base: str | None = _BASE_OPTION,
    adapter_off: bool = typer.Option(False, "--adapter-off", help="answers of the base model"),
    name: str | None = typer.Option(
        None, "--name", help="generator, or model_id, in the file; default: TARGET's name"
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="replace the file of answers"),
) -> None:
    """Answer AlpacaEval's or MT-Bench's prompts; a run that was stopped goes on by itself."""
    from .overrides import split_words

    (target, prompts), overrides = split_words(arguments or [], ("TARGET", "PROMPTS"))

    from .generate import GenerateOptions, run_generation

    options = GenerateOptions(
        form,
        output,
        batch_size,
        max_new_tokens,
        temperature,
        seed,
        base,
        adapter_off,
        name,
        overwrite,
    )
    run_generation(target, prompts, overrides, options)


@app.command(context_settings=_ANY_KEY)
def compare(
    arguments: list[str] = typer.Argument(
        None,
        metavar="CONFIG.yaml --loss-type orpo,dpo [beta=0.05,0.1,0.2] [key=value]...",
        help="the configuration, then what is compared, then settings for all runs",
        show_default=False,
    ),
    config: Path | None = _CONFIG_OPTION,
    output: Path | None = typer.Option(
        None, "--output", "-o", help="folder of all runs; default: output_dir with -compare"
    ),
) -> None:
    """Train by several losses or settings on the same pairs, and compare what came out."""
    from ..config.yaml_file import read_settings
    from .overrides import split_arguments

    path, overrides = split_arguments(arguments or [], config)
    read_settings(path)

    from .compare import run_comparison

    sys.exit(run_comparison(path, overrides, output=output, words=sys.argv[2:]))


@app.command()
def init(
    path: Path = typer.Argument(Path("config.yaml"), help="the file to write"),
    force: bool = typer.Option(False, "--force", help="replace an existing file"),
) -> None:
    """Write a commented configuration to start from."""
    from .init import write_template

    write_template(path, force=force)


@app.command()
def env() -> None:
    """Show versions, devices, and which kernel backend would run and why."""
    from .env import show_environment

    show_environment()


def run() -> None:
    """Run the command line; exit 2 with one line where the user can mend what is wrong."""
    # Read when torch is loaded. Its threads otherwise spin while they wait for each other, and on
    # a machine that does anything beside the training that made a run several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A notebook's `!lite-orpo ...` gives programs a terminal, but cannot show what moves on it.
    if "inline" in os.environ.get("MPLBACKEND", ""):
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    try:
        app()
    except UserError as error:
        print(f"lite-orpo: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from ..allocator_failure import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        # Outside a step's rows, where there is nothing to make smaller.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(
            f"lite-orpo: error: out of memory ({reason}); `lite-orpo plan` shows what takes it",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    run()
