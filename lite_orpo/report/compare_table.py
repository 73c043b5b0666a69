"""What `lite-orpo compare` prints: a line a run, a sentence, and the answers side by side."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..comparison.outcome import Result, read_comparison
from ..evaluation.figures import ACCURACY, CONTROLLED, LOG_ODDS, MARGIN, NLL_CHOSEN
from ..evaluation.intervals import Estimate
from .visible_text import make_visible

_FIGURES = (
    (ACCURACY, "accuracy", 2),
    (CONTROLLED, "length\nevened", 2),
    (MARGIN, "margin", 3),
    (LOG_ODDS, "log odds", 2),
    (NLL_CHOSEN, "NLL", 2),
)
_WIDE = 100  # columns of a terminal that has room for all of them
_SHORT = 14  # characters of a name that has room in a narrower one


def print_comparison(console: Console, results: Sequence[Result], pairs: int) -> None:
    """Print the table and how to read it.

    Args:
        console: where to.
        results: the base model first, then the runs.
        pairs: held-out pairs.
    """
    names = _names(console, results)
    table = Table(
        title=f"{pairs:,} held-out pairs; below each figure its 95 % interval",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold", min_width=8)
    shown = [figure for figure in _FIGURES if figure[0] != CONTROLLED or console.width >= _WIDE]
    for _, heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("time", "peak\nMiB", "tokens\n/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in zip(names, results, strict=True):
        figures = [_cell(result.estimate(key), digits) for key, _, digits in shown]
        table.add_row(Text(name), *figures, *_costs(result))
    console.print(table)
    for result in results:
        if result.problem is not None:
            text = make_visible(f"{result.label}: {result.problem}")
            console.print(Padding(Text(text, style="red"), (0, 0, 0, 2)))
    console.print(Padding(_of_costs(results), (0, 0, 0, 2)), style="dim", highlight=False)
    for sentence in read_comparison(results):
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)


def _names(console: Console, results: Sequence[Result]) -> list[str]:
    """What each line is called; where that has no room beside the figures, numbers and a key."""
    labels = [make_visible(result.label) for result in results]
    if console.width >= _WIDE or max(map(len, labels)) <= _SHORT:
        return labels
    for number, label in enumerate(labels[1:], 1):
        console.print(Text(f"{number:>4}  {label}"))
    return [labels[0], *(f"{i} {label.split(' ')[0]}" for i, label in enumerate(labels[1:], 1))]


def _of_costs(results: Sequence[Result]) -> str:
    text = (
        "time: of training, with its evaluations and the scoring by a reference; peak: of the "
        "whole process on a CPU, of the allocator on a GPU; tokens: that passed the model"
    )
    if any(result.label.split(" ")[0] == "sft" for result in results):
        text += " (sft passes no rejected answers)"
    return text


def print_answers(console: Console, prompts: Sequence[str], results: Sequence[Result]) -> None:
    """Print each prompt with every model's answer below the other."""
    width = max(len(result.label) for result in results)
    answered = [result for result in results if result.answers]
    for number, prompt in enumerate(prompts):
        lines = []
        for place, result in enumerate(answered):
            style = "bold red" if place == 0 else "bold green"
            line = Table.grid(padding=(0, 2))
            line.add_column(width=min(width, 28), overflow="fold")
            line.add_column(ratio=1)
            line.add_row(Text(result.label, style=style), Text(result.answers[number]))
            lines.append(line)
        title = Text(" ".join(make_visible(prompt).split())[:100])
        console.print(Panel(Group(*lines), title=title, title_align="left"))


def minutes(seconds: float) -> str:
    """A duration as 4.1 s, 41 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{text:0>5}" if hours else text


def _cell(estimate: Estimate | None, digits: int) -> Text:
    if estimate is None:
        return Text("-")
    text = Text(f"{estimate.value:.{digits}f}")
    if estimate.low is not None and estimate.high is not None:
        interval = f"\n{estimate.low:.{digits}f}..{estimate.high:.{digits}f}"
        text.append(interval, style="dim")
    return text


def _costs(result: Result) -> list[str]:
    cost = result.cost
    if cost is None:
        return ["", "", ""]
    return [
        minutes(cost.seconds),
        "-" if cost.peak_mib is None else f"{cost.peak_mib:,.0f}",
        "-" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.0f}",
    ]
