"""compare.png: what came out and what it took, a panel each, a colour a run."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.outcome import Result
from ..errors import ConfigError
from ..evaluation.figures import ACCURACY, LOG_ODDS, MARGIN, NLL_CHOSEN
from .visible_text import make_visible

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#eeca3b", "#9d755d")
_BASE = "#9a9a9a"
_NAME_LENGTH = 28
_PANELS = (
    (ACCURACY, "Accuracy: chosen likelier (dashed: a coin)", 0.5),
    (MARGIN, "Margin, nats a token", 0.0),
    (LOG_ODDS, "Log odds, chosen over rejected", 0.0),
    (NLL_CHOSEN, "NLL of chosen, nats a token (lower is better)", None),
)
_COSTS = (
    ("seconds", "Training time, seconds"),
    ("peak_mib", "Peak memory, MiB"),
    ("tokens_per_second", "Tokens a second"),
)
_CURVE = "eval_log_odds_chosen"


def draw_comparison(path: Path, results: Sequence[Result], title: str) -> None:
    """Draw the picture.

    Args:
        path: the PNG to write.
        results: the base model first, then the runs.
        title: of the picture.

    Raises:
        ConfigError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result.evaluation is not None]
    colors = [_BASE, *(_COLORS[i % len(_COLORS)] for i in range(len(shown)))]
    names = [_name(result.label) for result in shown]
    lines = sum(name.count("\n") + 1 for name in names)
    height = max(6.0, 3.0 + 0.5 * len(shown), 3.0 + 0.36 * lines)
    figure, axes = pyplot.subplots(2, 4, figsize=(17, height), constrained_layout=True)
    for axis, (key, heading, reference) in zip(axes[0], _PANELS, strict=True):
        for place, (result, color) in enumerate(zip(shown, colors, strict=False)):
            _draw_estimate(axis, place, result.estimate(key), color)
        _finish(axis, names, heading, reference, is_first=key == ACCURACY)
    for axis, (name, heading) in zip(axes[1], _COSTS, strict=False):
        for place, (result, color) in enumerate(zip(shown, colors, strict=False)):
            value = getattr(result.cost, name) if result.cost is not None else None
            if value is not None:
                axis.barh(place, value, color=color, height=0.6)
                text = f" {value:,.{int(value < 9.95)}f}"
                axis.annotate(text, (value, place), va="center", fontsize=8, clip_on=False)
        _finish(axis, names, heading, None, is_first=name == "seconds")
        axis.margins(x=0.2)
    _draw_curves(axes[1][3], shown, colors)
    figure.suptitle(make_visible(title).replace("$", r"\$"), fontsize=12)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _draw_estimate(axis: Any, place: int, estimate: Any, color: str) -> None:
    if estimate is None:
        return
    if estimate.low is not None:
        axis.plot([estimate.low, estimate.high], [place, place], color=color, lw=2.5, alpha=0.6)
    axis.plot([estimate.value], [place], "o", color=color, markersize=7)


def _finish(
    axis: Any, names: list[str], heading: str, reference: float | None, *, is_first: bool
) -> None:
    if reference is not None:
        axis.axvline(reference, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(names)), names if is_first else [""] * len(names), fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(heading, fontsize=10)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="x", labelsize=8)


def _draw_curves(axis: Any, shown: Sequence[Result], colors: Sequence[str]) -> None:
    has_any = False
    for result, color in zip(shown, colors, strict=False):
        points = [(line["step"], float(line[_CURVE])) for line in result.history if _CURVE in line]
        if len(points) > 1:
            has_any = True
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color)
    if not has_any:
        axis.set_axis_off()
        text = "fewer than two evaluations\non the way (eval_steps)"
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color="#777777")
        return
    axis.set_title("Held-out log odds by optimiser step", fontsize=10)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def _name(label: str) -> str:
    # Whole: what tells runs apart stands at the end.
    lines = textwrap.wrap(make_visible(label), _NAME_LENGTH)
    return "\n".join(lines).replace("$", r"\$")
