"""`lite-orpo eval`: score held-out pairs with the adapter on and off, and say what that means."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from ..config.options import DataOptions
from ..config.yaml_file import Setting, parse_value
from ..data.files.run_sources import open_run_sources
from ..data.files.sources import open_source
from ..data.row_category import Categories, categories_of
from ..data.row_source import RowSource
from ..errors import ConfigError, DataError, HubError, ModelError
from ..evaluation.figures import evaluate_scores
from ..public_names import short_name
from ..report.eval_json import write_eval_json
from ..report.eval_picture import draw_evaluation
from ..report.eval_table import print_evaluation
from .score_target import refuse_missing_base, score_target
from .target import Target, resolve_target
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
    try:
        source = _held_out(target, options)
    except DataError as error:
        if options.data is not None or "no such file" not in str(error):
            raise
        # Written down as it was given, or without the path of the machine.
        raise DataError(
            f"{error} ({target.name}'s configuration names it, as seen from the folder where the "
            "training was started; --data names a file here)"
        ) from None
    output = _output_folder(target, options.output)
    target.config.training.output_dir = str(output)
    target = _with_base(console, target, options)
    groups = _Groups(console, source, options.by)
    scored = score_target(target, source, groups.look_at_rows)
    ours, theirs, categories = scored.after, scored.before, groups.categories
    for line in scored.data_lines:
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    column = None if categories is None else categories.column
    evaluation = evaluate_scores(
        ours,
        theirs,
        groups=None if categories is None else categories.values,
        reward_scale=scored.reward_scale,
    )
    trained = "the adapter" if target.adapter is not None else "the model"
    print_evaluation(console, evaluation, trained=trained, column=column)
    base = target.model if target.adapter is not None else target.base
    about = {
        "model": target.name,
        "base": None if base is None else short_name(base),
        "data": short_name(source.name),
        "reward_scale": scored.reward_scale,
        "rows": scored.rows_description,
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


class _Groups:
    def __init__(self, console: Console, source: RowSource, column: str | None) -> None:
        self._console = console
        self._source = source
        self._column = column
        self.categories: Categories | None = None

    def look_at_rows(self, rows: list[int]) -> None:
        found = categories_of(self._source, rows, self._column)
        if found is None or found.say_something:
            self.categories = found
        elif self._column is not None:
            self._console.print(
                f"  {self._column} has one value, or almost as many as there are pairs: it makes "
                "no groups",
                highlight=False,
                soft_wrap=True,
            )


def _with_base(console: Console, target: Target, options: EvalOptions) -> Target:
    try:
        refuse_missing_base(target)
    except (HubError, ModelError):
        if options.base is not None:
            raise
        # The model can be looked at alone, and its base may be on another machine.
        console.print(
            f"  its base, {target.base}, is not here: no figures of before (--base names another)",
            highlight=False,
            soft_wrap=True,
        )
        return target._replace(base=None)
    return target


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
