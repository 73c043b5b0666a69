"""eval.png: accuracies with their intervals, by group too, and the margins before and after."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.figures import ACCURACY, CONTROLLED, Evaluation, Figure
from ..evaluation.intervals import Array, Estimate
from .visible_text import make_visible

_BEFORE, _AFTER = "#9a9a9a", "#4c78a8"
_GROUPS_DRAWN = 12
_NAME_LENGTH = 24


def draw_evaluation(
    path: Path,
    evaluation: Evaluation,
    margins: Array,
    margins_before: Array | None,
    *,
    title: str,
    column: str | None,
) -> None:
    """Draw the picture.

    Args:
        path: the PNG to write.
        evaluation: the figures.
        margins: [N], mean log-probability of chosen minus rejected, of each pair.
        margins_before: [N], the same by the base; None where there is none.
        title: of the picture.
        column: what the groups are by.

    Raises:
        ConfigError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _rows(evaluation, column)
    height = max(3.8, 1.6 + 0.42 * len(rows))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, height), constrained_layout=True, width_ratios=(1.25, 1)
    )
    _draw_accuracies(left, rows)
    _draw_margins(right, margins, margins_before)
    figure.suptitle(make_visible(title).replace("$", r"\$"), fontsize=12)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _rows(evaluation: Evaluation, column: str | None) -> list[tuple[str, Figure]]:
    overall = evaluation.overall
    rows = [(f"all pairs (n {overall.pairs:,})", overall.figures[ACCURACY])]
    if CONTROLLED in overall.figures:
        rows.append(("all, length-controlled", overall.figures[CONTROLLED]))
    for group in evaluation.groups[:_GROUPS_DRAWN]:
        name = make_visible(str(group.name))
        name = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
        rows.append((f"{name} (n {group.pairs:,})".replace("$", r"\$"), group.figures[ACCURACY]))
    return rows


def _draw_accuracies(axis: Any, rows: list[tuple[str, Figure]]) -> None:
    has_before = rows[0][1].before is not None
    for place, (_, figure) in enumerate(rows):
        if figure.before is not None:
            _draw_estimate(axis, place - 0.14, figure.before, _BEFORE, "before", place == 0)
        _draw_estimate(
            axis,
            place + (0.14 if has_before else 0.0),
            figure.after,
            _AFTER,
            "after" if has_before else "accuracy",
            place == 0,
        )
    axis.axvline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_title("Accuracy: chosen likelier than rejected (dashed: a coin)", fontsize=10)
    axis.set_xlabel("share of pairs, 95 % interval", fontsize=9)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="x", labelsize=8)
    if has_before:
        axis.legend(fontsize=8, frameon=False, loc="best")


def _draw_estimate(
    axis: Any, place: float, estimate: Estimate, color: str, label: str, is_first: bool
) -> None:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    axis.plot([low, high], [place, place], color=color, linewidth=2.5, alpha=0.6)
    axis.plot(
        [estimate.value], [place], "o", color=color, markersize=6, label=label if is_first else None
    )


def _draw_margins(axis: Any, margins: Array, before: Array | None) -> None:
    import numpy

    every = margins if before is None else numpy.concatenate([margins, before])
    # A few far pairs must not squeeze all others into one bar: they are drawn at the edge.
    low, high = numpy.quantile(every, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 1.0
    bins = numpy.linspace(low - room, high + room, 31)
    if before is not None:
        axis.hist(
            before.clip(bins[0], bins[-1]), bins=bins, color=_BEFORE, alpha=0.65, label="before"
        )
    label = "after" if before is not None else "pairs"
    axis.hist(margins.clip(bins[0], bins[-1]), bins=bins, color=_AFTER, alpha=0.65, label=label)
    axis.axvline(0.0, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_title("Margin of each pair (right of 0: chosen likelier)", fontsize=10)
    axis.set_xlabel("mean log-probability, chosen - rejected, nats a token", fontsize=9)
    axis.set_ylabel("pairs", fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    axis.tick_params(labelsize=8)
    if before is not None:
        axis.legend(fontsize=8, frameon=False)
