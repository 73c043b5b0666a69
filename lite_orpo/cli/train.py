"""`lite-orpo train`: from a configuration to an adapter, and what a person reads on the way.

Order of a run: check everything that can be checked without a model, load, evaluate the base
model, train, evaluate again, answer a few held-out prompts with the adapter off and on, save.
"""

import contextlib
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..checkpoint.one_writer import only_writer
from ..checkpoint.writing import writing
from ..config.run_config import RunConfig, load_run_config
from ..config.yaml_file import Setting
from ..data.files.run_sources import Sources, open_run_sources
from ..errors import ConfigError
from ..interruption import StopWithCheckpoint
from ..losses.objective import Objective
from ..memory.device import PeakMemory
from ..model.adapter import adapter_switched_off, lora_config, trainable_parameters
from ..model.load import load_model, load_tokenizer
from ..public_names import short_name
from ..report.card import write_card
from ..report.curves import draw_curves
from ..report.evaluation_samples import SamplesAtEvaluations
from ..report.metrics_file import MetricsFile, read_metrics
from ..report.progress import TrainingProgress
from ..report.samples import Answered, Sample, answer, pick_samples
from ..trainer import ORPOTrainer
from .lasting_console import LastingConsole
from .library_refusals import library_refusals
from .memory_report import print_memory
from .output_folder import (
    CONFIG_FILE,
    CURVES_FILE,
    METRICS_FILE,
    SettingsFile,
    check_output_dir,
    check_writable,
    remove_earlier_run,
)
from .quick_check import print_quick_check
from .stopped import SoFar, command_to_go_on, print_stopped
from .train_output import print_outcome, print_refused, print_samples, print_start, print_usage


def run_training(
    path: Path, overrides: dict[str, Setting], *, stop_after: float | None = None
) -> int:
    """Run a training as the configuration says.

    Args:
        path: the YAML file.
        overrides: settings from the command line.
        stop_after: stop with a checkpoint after so many seconds of training.

    Returns:
        The exit code: 0, or where a signal stopped the training, 128 and its number.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    console = LastingConsole(quiet=int(os.environ.get("RANK", "0")) != 0)
    so_far = SoFar()
    try:
        with contextlib.ExitStack() as held:
            return _run(path, overrides, stop_after, console, so_far, held)
    except KeyboardInterrupt:
        console.print(Text(f"Stopped; {so_far.text}"), soft_wrap=True)
        raise


def _run(
    path: Path,
    overrides: dict[str, Setting],
    stop_after: float | None,
    console: Console,
    so_far: SoFar,
    held: contextlib.ExitStack,
) -> int:
    quiet_libraries(console)
    started = time.perf_counter()
    config = load_run_config(path, overrides)
    console.quiet = config.training.process_index != 0  # not every launcher sets RANK
    sources = open_sources(config)
    if config.training.process_index == 0:
        check_writable(config)
        held.enter_context(only_writer(Path(config.training.output_dir)))
    check_output_dir(config, path)
    print_quick_check(console, sources.train, sources.held_out)
    with library_refusals(path, (ImportError, ValueError, RuntimeError, OSError)):
        trainer = _build_trainer(config, sources, console)
    output_dir = Path(config.training.output_dir)
    if trainer.is_world_process_zero():
        is_resumed = bool(config.training.resume_from_checkpoint)
        if config.report.overwrite_output_dir and not is_resumed:
            remove_earlier_run(output_dir)
        settings = SettingsFile(output_dir / CONFIG_FILE, config)
        if is_resumed:
            trainer.add_callback(settings)
        else:
            settings.write()
    print_start(console, config, trainer, trainable_parameters(trainer.model))
    has_held_out = trainer.eval_dataset is not None
    before = _metrics_before(trainer, config, output_dir)
    samples = _samples(config, trainer, sources)
    base_answers = _answers_before(trainer, config, samples)
    _sample_at_evaluations(console, trainer, config, samples, base_answers)
    stop = StopWithCheckpoint(stop_after)
    trainer.add_callback(stop)
    peak = PeakMemory(config.training.device)
    so_far.trains_into(output_dir)
    with library_refusals(path, (ImportError,)):
        trainer.train(resume_from_checkpoint=config.training.resume_from_checkpoint)
    state = trainer.state
    metrics_file = output_dir / METRICS_FILE
    print_refused(console, read_metrics(metrics_file) if metrics_file.exists() else [])
    if stop.has_stopped and state.global_step < state.max_steps:
        assert stop.reason is not None
        command = command_to_go_on(path, overrides, os.environ)
        name = f"checkpoint-{state.global_step}"
        print_stopped(console, stop.reason, state.global_step, state.max_steps, name, command)
        return 0 if stop.signal is None else 128 + stop.signal
    memory = peak.allocated(), peak.beyond()
    # Before anything else that could be stopped, or fail.
    _save(trainer)
    so_far.is_saved(output_dir)
    if stop.signal is not None:
        console.print(f"Stopped ({stop.reason}) after the last step, before the last evaluation.")
        print_usage(console, config, output_dir, METRICS_FILE, curves=None)
        return 128 + stop.signal
    after = _held_out_metrics(trainer) if has_held_out else {}
    answered = _answers_after(trainer, config, samples, base_answers)
    if trainer.is_world_process_zero():
        with writing(f"{output_dir}: the report", "what was trained is there, and complete"):
            _write_report(config, output_dir, before, after)
    print_samples(console, answered)
    print_outcome(console, before, after, time.perf_counter() - started)
    print_memory(console, config, trainer, *memory)
    print_usage(console, config, output_dir, METRICS_FILE, CURVES_FILE)
    return 0


def _save(trainer: ORPOTrainer) -> None:
    folder, step = trainer.args.output_dir, trainer.state.global_step
    last = Path(folder) / f"checkpoint-{step}"
    # A run is not gone on with from its last step.
    advice = (
        f"{last} holds the same weights" if last.exists() else "mend that, and go on with --resume"
    )
    with writing(f"{folder}: what was trained", advice):
        trainer.save_model()
        trainer.save_state()


def quiet_libraries(console: Console) -> None:
    """Let our own lines be seen: libraries speak only of what is wrong."""
    import datasets
    import transformers
    from rich.logging import RichHandler

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Notices from one library to another about names that change; nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=True)
    logger = logging.getLogger("lite_orpo")
    logger.handlers = [handler]
    logger.propagate = False


def open_sources(config: RunConfig) -> Sources:
    """Open the pairs that a configuration names, without reading them.

    Raises:
        ConfigError: none are named, or evaluations are asked for without held-out pairs.
        DataError: a file or data set cannot be opened.
    """
    data = config.data
    if data.dataset_name is None:
        raise ConfigError("dataset_name is not set; give a preference file or a hub name")
    sources = open_run_sources(data)
    if sources.held_out is None and config.training.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy is {config.training.eval_strategy.value}, but there are no held-out "
            "pairs; set eval_dataset_name, or eval_strategy: no"
        )
    return sources


def _build_trainer(config: RunConfig, sources: Sources, console: Console) -> ORPOTrainer:
    from transformers import PrinterCallback, set_seed

    args = config.training
    tokenizer = load_tokenizer(config.model)
    # The adapter's first values are random: the seed comes before it, or runs differ.
    set_seed(args.seed)
    model = load_model(config.model, args.device, trains_all_weights=not config.lora.use_peft)
    args.disable_tqdm = True
    output_dir = Path(args.output_dir)
    callbacks: list[Any] = [TrainingProgress(console)]
    if args.process_index == 0:
        is_resumed = bool(args.resume_from_checkpoint)
        callbacks.append(MetricsFile(output_dir / METRICS_FILE, append=is_resumed))
    trainer = ORPOTrainer(
        model=model,
        args=args,
        train_dataset=sources.train,
        eval_dataset=sources.held_out,
        processing_class=tokenizer,
        peft_config=lora_config(config.lora),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _metrics_before(trainer: ORPOTrainer, config: RunConfig, output_dir: Path) -> dict[str, float]:
    """Held-out figures of the base model: measured, or those of the run that is resumed."""
    if trainer.eval_dataset is None or not config.report.eval_before_training:
        return {}
    if not config.training.resume_from_checkpoint:
        return trainer.evaluate()
    metrics_file = output_dir / METRICS_FILE
    lines = read_metrics(metrics_file) if metrics_file.exists() else []
    return next((line for line in lines if line["step"] == 0 and "eval_loss" in line), {})


def _samples(config: RunConfig, trainer: ORPOTrainer, sources: Sources) -> list[Sample]:
    if sources.held_out is None or not trainer.is_world_process_zero():
        return []
    return pick_samples(trainer.eval_dataset, sources.held_out, config.report.sample_prompts)


def _answers_before(trainer: ORPOTrainer, config: RunConfig, samples: list[Sample]) -> list[str]:
    """Answers of a model that trains in full; an adapter is switched off afterwards instead."""
    if config.lora.use_peft or not samples:
        return []
    return answer(
        trainer.model, trainer.processing_class, samples, config.report.sample_max_new_tokens
    )


def _sample_at_evaluations(
    console: Console,
    trainer: ORPOTrainer,
    config: RunConfig,
    samples: list[Sample],
    base_answers: list[str],
) -> None:
    if not config.report.sample_at_evaluations:
        return
    if trainer.equal_rows:
        raise ConfigError(
            "sample_at_evaluations is not supported with FSDP, where one rank cannot answer alone"
        )
    if not samples:
        return
    callbacks = trainer.callback_handler.callbacks
    metrics = next((each for each in callbacks if isinstance(each, MetricsFile)), None)
    length = config.report.sample_max_new_tokens

    def show(answered: list[Answered]) -> None:
        print_samples(console, answered)

    trainer.add_callback(
        SamplesAtEvaluations(trainer, samples, length, base_answers, show, metrics)
    )


def _answers_after(
    trainer: ORPOTrainer, config: RunConfig, samples: list[Sample], base_answers: list[str]
) -> list[Answered]:
    if not samples:
        return []
    length = config.report.sample_max_new_tokens
    model, tokenizer = trainer.model, trainer.processing_class
    if config.lora.use_peft:
        with adapter_switched_off(model):
            base_answers = answer(model, tokenizer, samples, length)
    trained_answers = answer(model, tokenizer, samples, length)
    return [
        Answered(sample.text, before, after)
        for sample, before, after in zip(samples, base_answers, trained_answers, strict=True)
    ]


def _held_out_metrics(trainer: ORPOTrainer) -> dict[str, float]:
    """The evaluation of the final weights; made now unless the last step made it."""
    if trainer.args.load_best_model_at_end:
        return trainer.evaluate()  # the weights are another checkpoint's than the last figures
    for line in reversed(trainer.state.log_history):
        if line.get("step") != trainer.state.global_step:
            break
        if "eval_loss" in line and trainer.state.global_step > 0:
            return dict(line)
    return trainer.evaluate()


def _write_report(
    config: RunConfig, output_dir: Path, before: dict[str, float], after: dict[str, float]
) -> None:
    if config.report.save_plots:
        metrics = read_metrics(output_dir / METRICS_FILE)
        draw_curves(
            metrics,
            output_dir / CURVES_FILE,
            f"{config.training.loss_type.upper()}: {output_dir.name}",
        )
    args = config.training
    settings = {
        **Objective.of(args).settings(),
        "learning rate": args.learning_rate,
        "schedule": args.lr_scheduler_type.value,
        "pairs per optimiser step": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "optimiser steps": args.max_steps if args.max_steps > 0 else None,
        "seed": args.seed,
    }
    if config.lora.use_peft:
        settings["LoRA r / alpha"] = f"{config.lora.lora_r} / {config.lora.lora_alpha}"
    write_card(
        output_dir / "README.md",
        base_model=short_name(str(config.model.model_name_or_path)),
        data=short_name(str(config.data.dataset_name)),
        settings=settings,
        before=before,
        after=after,
        has_adapter=config.lora.use_peft,
        loss_type=args.loss_type,
        is_local=Path(str(config.model.model_name_or_path)).expanduser().exists(),
    )
