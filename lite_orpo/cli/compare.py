"""`lite-orpo compare`: several losses or settings on the same pairs, and what came out of each.

Each run is a process of its own, one after the other. The held-out figures are measured here, in
the same way for all, whatever loss they were trained by.
"""

import gc
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..comparison.outcome import Result
from ..comparison.runs import Cost, Run, RunOutcome, cost_of, digest_of_files, make
from ..comparison.variants import Variant, variants_of
from ..config.run_config import RunConfig, load_run_config
from ..config.yaml_file import Setting, read_settings
from ..data.files.run_sources import open_run_sources
from ..data.files.sources import RowSource
from ..errors import ConfigError, ModelError
from ..evaluation.figures import evaluate_scores
from ..evaluation.scores import Scores
from ..model.adapter import adapter_switched_off, lora_config, wrap_with_adapter
from ..model.load import load_model, load_tokenizer
from ..public_names import short_name
from ..report.compare_json import write_comparison_json
from ..report.compare_picture import draw_comparison
from ..report.compare_table import minutes, print_answers, print_comparison
from ..report.metrics_file import read_metrics
from ..report.samples import Sample, answer, pick_samples
from ..trainer import ORPOTrainer
from .library_refusals import library_refusals
from .output_folder import METRICS_FILE
from .target import load_target_model, load_target_tokenizer, resolve_target
from .train import quiet_libraries

JSON_FILE, PICTURE_FILE, RUNS_FOLDER = "compare.json", "compare.png", "runs"
BASE_LABEL = "base model"
_WHERE = "compare"


class _Looked(NamedTuple):
    """What a model makes of the held-out pairs."""

    scores: Scores
    answers: tuple[str, ...]
    prepared: Any
    samples: list[Sample]


def run_comparison(
    path: Path, overrides: dict[str, Setting], *, output: Path | None, words: list[str]
) -> int:
    """Make the runs that are missing, then show what came out of all.

    Args:
        path: the configuration.
        overrides: settings of the command line, some with several values.
        output: where all of it goes; default: `output_dir` with `-compare` behind it.
        words: the command line, to say how to go on.

    Returns:
        The exit code: 0, 1 where a run has no result, 130 where a signal stopped them.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    console = Console()
    quiet_libraries(console)
    settings = read_settings(path)
    variants, same = variants_of(settings, overrides)
    _refuse_resuming(settings | same)
    config, *_ = [
        load_run_config(path, _settings(variant, same), tells_of_old_names=variant is variants[0])
        for variant in variants
    ]
    held_out = _held_out(config)
    folder = output or Path(f"{config.training.output_dir}-compare")
    data = digest_of_files((config.data.dataset_name, config.data.eval_dataset_name))
    runs = [_run(path, folder, variant, same)._replace(data=data) for variant in variants]
    is_finished = [run.is_finished() for run in runs]
    _print_start(console, variants, is_finished, folder)
    outcomes = []
    for variant, run, done in zip(variants, runs, is_finished, strict=True):
        outcome = RunOutcome() if done else _make(console, variant, run)
        if outcome.was_stopped:
            return _stopped(console, words)
        outcomes.append(outcome)
    try:
        results, samples = _results(path, config, held_out, variants, runs, outcomes, folder)
    except KeyboardInterrupt:
        return _stopped(console, words)
    scores = results[0].scores
    assert scores is not None
    pairs = len(scores.chosen)
    prompts = [sample.text for sample in samples]
    print_answers(console, prompts, results)
    print_comparison(console, results, pairs)
    about = {
        "base": short_name(str(config.model.model_name_or_path)),
        "data": short_name(held_out.name),
        "pairs": pairs,
        "settings": {variant.label: variant.overrides for variant in variants},
    }
    write_comparison_json(folder / JSON_FILE, results, about=about, prompts=prompts)
    title = f"{about['base']} on {about['data']} ({pairs:,} pairs)"
    draw_comparison(folder / PICTURE_FILE, results, title)
    console.print(
        f"  written: {folder / JSON_FILE}, {folder / PICTURE_FILE}; adapters in "
        f"{folder / RUNS_FOLDER}",
        style="dim",
        soft_wrap=True,
    )
    return int(any(outcome.problem is not None for outcome in outcomes))


def _stopped(console: Console, words: list[str]) -> int:
    console.print("Stopped. Go on with the same command:")
    console.print("    " + shlex.join(["lite-orpo", "compare", *words]), soft_wrap=True)
    return 130


def _refuse_resuming(settings: dict[str, Setting]) -> None:
    setting = settings.get("resume_from_checkpoint")
    if setting is not None and setting.value not in (None, False):
        raise ConfigError(
            f"{setting.where}: resume_from_checkpoint is for one run; a comparison that was "
            "stopped goes on by itself, with the same command"
        )


def _settings(variant: Variant, same: dict[str, Setting]) -> dict[str, Setting]:
    return same | {key: Setting(value, _WHERE) for key, value in variant.overrides.items()}


def _held_out(config: RunConfig) -> RowSource:
    if config.data.dataset_name is None:
        raise ConfigError("dataset_name is not set; give a preference file or a hub name")
    held_out = open_run_sources(config.data).held_out
    if held_out is None:
        raise ConfigError(
            "a comparison needs held-out pairs, which no run has seen; set eval_dataset_name"
        )
    return held_out


def _run(path: Path, folder: Path, variant: Variant, same: dict[str, Setting]) -> Run:
    fixed: dict[str, Any] = {
        "output_dir": str(folder / RUNS_FOLDER / variant.name),
        # Shared by all runs with a reference: it is the same model and the same pairs.
        "reference_cache": str(folder / "reference"),
        # Measured here, in the same way for all.
        "eval_before_training": False,
        "sample_prompts": 0,
        "sample_at_evaluations": False,
        # Several runs would overwrite each other there.
        "push_to_hub": False,
    }
    given = {key: setting.value for key, setting in same.items() if key not in fixed}
    return Run(Path(fixed["output_dir"]), path, given | variant.overrides | fixed)


def _print_start(
    console: Console, variants: list[Variant], is_finished: list[bool], folder: Path
) -> None:
    labels = ", ".join(variant.label for variant in variants)
    console.print(f"Comparing {labels}: same pairs, order, seed and steps.", soft_wrap=True)
    done = sum(is_finished)
    if done:
        console.print(
            f"{done} of {len(variants)} runs are in {folder} already and are not made again.",
            soft_wrap=True,
        )


def _make(console: Console, variant: Variant, run: Run) -> RunOutcome:
    with Progress(
        TextColumn("{task.description:>28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(variant.label, total=None, figures="loading")

        def on_step(step: int, steps: int, figures: str) -> None:
            bar.update(task, completed=step, total=steps, figures=figures)

        outcome = make(run, on_step)
    if outcome.problem is None:
        seconds = cost_of(read_metrics(run.folder / METRICS_FILE)).seconds
        console.print(f"  {variant.label}: trained in {minutes(seconds)}")
    elif not outcome.was_stopped:
        console.print(f"  {variant.label}: [red]no result[/red]", soft_wrap=True)
    return outcome


def _results(
    path: Path,
    config: RunConfig,
    held_out: RowSource,
    variants: list[Variant],
    runs: list[Run],
    outcomes: list[RunOutcome],
    folder: Path,
) -> tuple[list[Result], list[Sample]]:
    """Figures and answers of the base model and of each run, measured alike."""
    config.training.output_dir = str(folder)
    with library_refusals(path, (ImportError, ValueError, RuntimeError, OSError)):
        base = _look_at_base(config, held_out)
        results = [_result(BASE_LABEL, base, None)]
        for variant, run, outcome in zip(variants, runs, outcomes, strict=True):
            if outcome.problem is not None:
                results.append(Result(variant.label, None, None, None, outcome.problem))
                continue
            looked = _look_at_run(config, run, base)
            history = read_metrics(run.folder / METRICS_FILE)
            results.append(_result(variant.label, looked, cost_of(history), tuple(history)))
    return results, base.samples


def _result(
    label: str, looked: _Looked, cost: Cost | None, history: tuple[dict[str, Any], ...] = ()
) -> Result:
    evaluation = evaluate_scores(looked.scores)
    return Result(label, evaluation, looked.scores, cost, None, history, looked.answers)


def _look_at_base(config: RunConfig, held_out: RowSource) -> _Looked:
    tokenizer = load_tokenizer(config.model)
    uses_peft = config.lora.use_peft
    # As the runs have it, in 4 bits too: under an adapter, which is switched off.
    model = load_model(config.model, config.training.device, trains_all_weights=not uses_peft)
    switched_off: Callable[[Any], AbstractContextManager[None]] = nullcontext
    if uses_peft:
        least = replace(
            config.lora, lora_r=1, lora_alpha=1, lora_dropout=0.0, lora_modules_to_save=None,
            use_rslora=False, use_dora=False,
        )  # fmt: skip
        model, switched_off = wrap_with_adapter(model, lora_config(least)), adapter_switched_off
    return _look(config, model, tokenizer, held_out, held_out, as_it_is_scored=switched_off)


def _look_at_run(config: RunConfig, run: Run, base: _Looked) -> _Looked:
    target = resolve_target(str(run.folder), str(config.model.model_name_or_path), {})
    model = load_target_model(target, is_scored=True)
    return _look(config, model, load_target_tokenizer(target), base.prepared, None, base.samples)


def _look(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    dataset: Any,
    source: RowSource | None,
    samples: list[Sample] | None = None,
    as_it_is_scored: Callable[[Any], AbstractContextManager[None]] = nullcontext,
) -> _Looked:
    args = config.training
    args.disable_tqdm, args.loss_type = True, "orpo"  # no reference is needed to score
    args.push_to_hub, args.report_to = False, []
    trainer = ORPOTrainer(model=model, args=args, eval_dataset=dataset, processing_class=tokenizer)
    with as_it_is_scored(trainer.model):
        found = trainer.score_pairs()
    try:
        scores = Scores.of(found)
    except ValueError as error:
        raise ModelError(f"{error}; look at the model's weights, or try dtype=float32") from None
    prepared = trainer.eval_dataset
    if samples is None:
        assert source is not None
        samples = pick_samples(prepared, source, config.report.sample_prompts)
    with as_it_is_scored(trainer.model):
        answers = answer(trainer.model, tokenizer, samples, config.report.sample_max_new_tokens)
    # One model at a time.
    del trainer, model
    gc.collect()
    return _Looked(scores, tuple(answers), prepared, samples)
