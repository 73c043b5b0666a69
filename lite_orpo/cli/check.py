"""`lite-orpo check`: survey the pairs, print a table, write check.html and check.json."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..config.options import ModelOptions
from ..data.files.sources import RowSource
from ..data.inspection.survey import Survey, SurveyOptions, survey_pairs
from ..data.preparation import LengthRule
from ..errors import ConfigError
from ..report.check_json import write_json
from ..report.check_page import write_page
from .check_output import print_survey
from .check_target import CheckTarget

PAGE_FILE, JSON_FILE = "check.html", "check.json"
_WITH_SPLIT = re.compile(r"(.+)( \[[^\[\]]*\])", re.DOTALL)
_COUNTED_ENDINGS = (".jsonl", ".ndjson")


def run_check(target: CheckTarget, *, by: str | None, output: Path) -> bool:
    """Survey, print and write.

    Args:
        target: what to look at.
        by: the column to count rows by.
        output: the folder of the two files.

    Returns:
        Whether a finding is serious.

    Raises:
        UserError: nothing can be read, or the folder cannot be written.
    """
    console = Console()
    _make_folder(output)
    source, held_out = target.open()
    tokenizer, rule = load_check_tokenizer(target.model, target.rule, console)
    with _progress([source, *([held_out] if held_out is not None else [])]) as progress:
        survey = survey_pairs(
            source,
            held_out=held_out,
            tokenizer=tokenizer,
            options=SurveyOptions(rule, target.on_bad_row, balance_column=by),
            progress=progress,
        )
    named = without_folders(survey)
    model = None if tokenizer is None else _short(str(target.model.model_name_or_path))
    write_page(output / PAGE_FILE, named, model)
    write_json(output / JSON_FILE, named, model)
    print_survey(console, survey, model)
    console.print(f"  written: {output / PAGE_FILE}, {output / JSON_FILE}", style="dim")
    return survey.is_serious


def load_check_tokenizer(
    options: ModelOptions, rule: LengthRule, console: Console
) -> tuple[Any, LengthRule]:
    """The model's tokenizer, and the rule for long rows bounded by the model's positions.

    Args:
        options: the model's; without a name, None and the rule as it is come back.
        rule: the configured rule.
        console: is told where that changes the rule.

    Raises:
        ModelError: there is no such model.
        HubError: the hub does not give it.
    """
    if options.model_name_or_path is None:
        return None, rule
    import transformers

    from ..model.load import load_config, load_tokenizer

    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(options)
    config = load_config(options)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and (rule.max_length is None or rule.max_length > positions):
        console.print(
            f"  max_length {rule.max_length} is beyond the model's {positions} positions: "
            f"{positions} is used",
            style="dim",
            highlight=False,
        )
        return tokenizer, rule._replace(max_length=int(positions))
    return tokenizer, rule


def without_folders(survey: Survey) -> Survey:
    """The survey with the last part of local paths only: the files are made to be shared."""
    held_out = survey.held_out
    names = [survey.source] + ([] if held_out is None else [held_out.source])
    if held_out is not None:
        held_out = held_out._replace(source=_short(held_out.source))

    def public(text: str) -> str:
        for name in sorted(names, key=len, reverse=True):
            path, _ = _path_and_split(name)
            for part in (name, path) if len(Path(path).parts) > 1 else ():
                text = text.replace(part, _short(part))
        return text

    return dataclasses.replace(
        survey,
        source=_short(survey.source),
        held_out=held_out,
        stopped=None if survey.stopped is None else public(survey.stopped),
        findings=tuple(f._replace(title=public(f.title)) for f in survey.findings),
    )


def _short(name: str) -> str:
    """The last part of a local path, with the split behind it that a folder's name has."""
    path, split = _path_and_split(name)
    if not Path(path).expanduser().exists():
        return name
    return (Path(path).name or Path(path).resolve().name) + split


def _path_and_split(name: str) -> tuple[str, str]:
    """Two parts: `pairs [train]` is `pairs` and ` [train]`; without a split, the second is ""."""
    found = _WITH_SPLIT.fullmatch(name)
    if found is None or Path(name).expanduser().exists():
        return name, ""
    return found[1], found[2]


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None


@contextmanager
def _progress(sources: list[RowSource]) -> Iterator[Any]:
    """A bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    sizes = {source.name: source for source in sources}

    def tell(name: str, rows: int) -> None:
        if bar.disable:
            return
        if name not in tasks:
            tasks[name] = bar.add_task(_short(name), total=_rows_ahead(sizes[name]))
        bar.update(tasks[name], completed=rows)

    with bar:
        yield tell


def _rows_ahead(source: RowSource) -> int | None:
    """Rows of a source: as it says, or the lines of a plain file (a gigabyte a second)."""
    path = Path(source.name).expanduser()
    if source.size is not None or path.suffix not in _COUNTED_ENDINGS:
        return source.size
    try:
        with path.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
        return None
