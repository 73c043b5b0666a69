"""`lite-orpo eval`: score held-out pairs with the adapter on and off, and say what that means."""

import gc
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from ..config.options import DataOptions
from ..config.yaml_file import Setting, parse_value
from ..data.row_category import Categories, categories_of
from ..data.row_source import RowSource
from ..data.run_sources import open_run_sources
from ..data.sources import open_source
from ..errors import ConfigError, DataError, ModelError, UserError
from ..evaluation.figures import evaluate_scores
from ..evaluation.scores import Scores
from ..model.adapter import adapter_switched_off
from ..pair_scores import PairScores
from ..report.eval_json import write_eval_json
from ..report.eval_picture import draw_evaluation
from ..report.eval_table import print_evaluation
from ..trainer import ORPOTrainer
from .library_refusals import library_refusals
from .target import Target, load_target_model, load_target_tokenizer, resolve_target
from .train import quiet_libraries

JSON_FILE, PICTURE_FILE = "eval.json", "eval.png"


class EvalOptions(NamedTuple):
    """The options of the command; None: not given."""

    data: str | None
    base: str | None
    by: str | None
    output: Path | None
    split: str | None
    column_mapping: str | None


def run_evaluation(name: str, overrides: dict[str, Setting], options: EvalOptions) -> None:
    """Score, print, and write `eval.json` and `eval.png`.

    Args:
        name: a run's folder, an adapter, a model or a configuration.
        overrides: settings from the command line.
        options: the command's own.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    console = Console()
    quiet_libraries(console)
    if options.column_mapping is not None:
        overrides |= {
            "column_mapping": Setting(parse_value(options.column_mapping), "command line")
        }
    target = resolve_target(name, options.base, overrides)
    source = _held_out(target, options)
    output = _output_folder(target, options.output)
    target.config.training.output_dir = str(output)
    tokenizer = load_target_tokenizer(target)
    with library_refusals(Path(name), (ImportError, ValueError, RuntimeError, OSError)):
        trainer = _trainer(target, target, tokenizer, source)
        categories = _categories(console, trainer, source, options.by)
        after, before = _score(target, trainer, tokenizer)
    for line in trainer.data_reports[0].lines():
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    ours = _checked(after, target.name)
    theirs = None if before is None else _checked(before, "the base model")
    kind = trainer.objective.kind
    is_of_means = kind.is_of_means and not kind.uses_reference
    scale = trainer.objective.reward_scale if is_of_means else None
    column = None if categories is None else categories.column
    evaluation = evaluate_scores(
        ours,
        theirs,
        groups=None if categories is None else categories.values,
        reward_scale=scale,
    )
    trained = "the adapter" if target.adapter is not None else "the model"
    print_evaluation(console, evaluation, trained=trained, column=column)
    about = {
        "model": target.name,
        "base": _public(target.model if target.adapter is not None else target.base),
        "data": _public(source.name),
        "reward_scale": scale,
        "rows": trainer.rows_description,
    }
    write_eval_json(output / JSON_FILE, evaluation, about=about, trained=trained, column=column)
    draw_evaluation(
        output / PICTURE_FILE,
        evaluation,
        ours.mean_chosen - ours.mean_rejected,
        None if theirs is None else theirs.mean_chosen - theirs.mean_rejected,
        title=f"{target.name} on {about['data']}",
        column=column,
    )
    console.print(
        f"  written: {output / JSON_FILE}, {output / PICTURE_FILE}", style="dim", soft_wrap=True
    )


def _trainer(target: Target, model: Target, tokenizer: Any, source: RowSource) -> ORPOTrainer:
    args = target.config.training
    args.disable_tqdm = True
    return ORPOTrainer(
        model=load_target_model(model, is_scored=True),
        args=args,
        eval_dataset=source,
        processing_class=tokenizer,
    )


def _score(
    target: Target, trainer: ORPOTrainer, tokenizer: Any
) -> tuple[PairScores, PairScores | None]:
    """With the adapter on, and off; or a whole model, and what it was before."""
    after = trainer.score_pairs()
    if target.adapter is not None:
        with adapter_switched_off(trainer.model):
            return after, trainer.score_pairs()
    if target.base is None:
        return after, None
    prepared = trainer.eval_dataset
    # One model at a time: the trained one makes room for its base.
    trainer.model = trainer.model_wrapped = None
    gc.collect()
    base = _trainer(target, target._replace(model=target.base), tokenizer, prepared)
    return after, base.score_pairs()


def _categories(
    console: Console, trainer: ORPOTrainer, source: RowSource, column: str | None
) -> Categories | None:
    found = categories_of(source, list(trainer.eval_dataset["row"]), column)
    if found is None or found.say_something:
        return found
    if column is not None:
        console.print(
            f"  {column} has one value, or almost as many as there are pairs: it makes no groups",
            highlight=False,
        )
    return None


def _held_out(target: Target, options: EvalOptions) -> RowSource:
    data: DataOptions = target.config.data
    split = options.split or data.dataset_test_split
    name = options.data or data.eval_dataset_name
    if name is not None:
        # The mapping of a run's file is that of its columns; another file has its own.
        is_own = options.data is None or options.column_mapping is not None
        mapping = data.column_mapping if is_own else None
        return open_source(
            name, split=split, config_name=data.dataset_config, column_mapping=mapping
        )
    held_out = None
    if data.dataset_name is not None:
        if options.split is not None:
            return open_source(
                data.dataset_name,
                split=split,
                config_name=data.dataset_config,
                column_mapping=data.column_mapping,
            )
        held_out = open_run_sources(data).held_out
    if held_out is None:
        raise DataError(
            f"{target.name} names no held-out pairs; give a file or data set of pairs by --data"
        )
    return held_out


def _output_folder(target: Target, asked: Path | None) -> Path:
    folder = asked if asked is not None else (target.folder or Path("eval"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give --output another folder"
        ) from None
    return folder


def _checked(scores: PairScores, who: str) -> Scores:
    try:
        return Scores.of(scores)
    except UserError:
        raise
    except ValueError as error:
        if not len(scores.rows):
            raise DataError("there are no pairs to evaluate on") from None
        raise ModelError(f"{who}: {error}; look at its weights, or try dtype=float32") from None


def _public(name: str | None) -> str | None:
    """A hub name as it is; of a local path only its last part."""
    if name is None:
        return None
    return Path(name).name if Path(name).expanduser().exists() else name
