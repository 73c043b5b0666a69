"""What `lite-orpo eval` prints: sentences first, then the figures, then the groups."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..evaluation.figures import ACCURACY, CONTROLLED, LABELS, MARGIN, Evaluation, GroupFigures
from ..evaluation.intervals import Estimate
from ..evaluation.reading import FEW_PAIRS, read_figures
from .visible_text import make_visible

_GROUPS_SHOWN = 20


def print_evaluation(
    console: Console, evaluation: Evaluation, *, trained: str, column: str | None
) -> None:
    """Print all of it.

    Args:
        console: where to.
        evaluation: the figures.
        trained: what the trained model is called in sentences, "the adapter".
        column: what the groups are by.
    """
    for sentence in read_figures(evaluation.overall, trained):
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)
    console.print(_figures(evaluation.overall))
    if evaluation.groups:
        console.print(_groups(evaluation, str(column)))


def _figures(group: GroupFigures) -> Table:
    figures = group.figures
    has_before = any(figure.before is not None for figure in figures.values())
    title = f"{group.pairs:,} pairs; below each figure its 95 % interval"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    if has_before:
        table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after" if has_before else "", justify="right", no_wrap=True)
    if has_before:
        table.add_column("difference", justify="right", no_wrap=True)
    for key, figure in figures.items():
        label = Text(f"{LABELS[key].name}\n").append(LABELS[key].meaning, style="dim")
        if not has_before:
            table.add_row(label, _cell(figure.after))
            continue
        difference = _cell(figure.difference, "+")
        if figure.difference is not None and figure.difference.excludes_zero:
            difference.stylize("bold")
        table.add_row(label, _cell(figure.before), _cell(figure.after), difference)
    return table


def _groups(evaluation: Evaluation, column: str) -> Table:
    title = Text(f"By {make_visible(column)}")
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("", overflow="fold", min_width=16)
    has_before = evaluation.overall.figures[ACCURACY].before is not None
    headings = ["accuracy", "no length", "margin"]
    for heading in ["before", *headings] if has_before else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for group in evaluation.groups[:_GROUPS_SHOWN]:
        few = " (few)" if group.pairs < FEW_PAIRS else ""
        name = Text(make_visible(str(group.name))).append(f"\n{group.pairs:,} pairs{few}", "dim")
        cells = [_cell(group.figures[ACCURACY].before, digits=2)] if has_before else []
        for key in (ACCURACY, CONTROLLED, MARGIN):
            is_there = key in group.figures
            digits = 3 if key == MARGIN else 2
            cells.append(_cell(group.figures[key].after, digits=digits) if is_there else Text("-"))
        table.add_row(name, *cells)
    if len(evaluation.groups) > _GROUPS_SHOWN:
        table.add_row(f"{len(evaluation.groups) - _GROUPS_SHOWN} more in eval.json")
    return table


def _cell(estimate: Estimate | None, sign: str = "", digits: int = 3) -> Text:
    if estimate is None:
        return Text("")
    form = f"{sign}.{digits}f"
    text = Text(format(estimate.value, form))
    if estimate.low is not None and estimate.high is not None:
        interval = f"\n{format(estimate.low, form)} to {format(estimate.high, form)}"
        text.append(interval, style="dim")
    return text
