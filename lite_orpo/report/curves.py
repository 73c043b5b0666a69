"""curves.png: how loss, margin, accuracy and log odds went, training and held-out."""

from pathlib import Path
from typing import Any, NamedTuple


class _Panel(NamedTuple):
    key: str
    title: str
    reference: float | None  # a line worth comparing with


_PANELS = (
    _Panel("loss", "Loss", None),
    _Panel("rewards/accuracies", "Accuracy: chosen likelier than rejected", 0.5),
    _Panel("rewards/margins", "Reward margin: chosen minus rejected", 0.0),
    _Panel("log_odds_chosen", "Log odds: chosen over rejected", 0.0),
)


def draw_curves(metrics: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the four curves of a run.

    Args:
        metrics: log lines with `step`, as `metrics_file.read_metrics` returns them.
        path: the PNG to write.
        title: the picture's title.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not any("loss" in line or "eval_loss" in line for line in metrics):
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    for axis, panel in zip(axes.flat, _PANELS, strict=True):
        for prefix, label, style in (
            ("", "training", {"color": "#4c78a8", "linewidth": 1.5}),
            ("eval_", "held-out", {"color": "#e45756", "marker": "o", "linewidth": 1.5}),
        ):
            key = prefix + panel.key
            points = [(line["step"], float(line[key])) for line in metrics if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        if panel.reference is not None:
            axis.axhline(panel.reference, color="#999999", linewidth=0.8, linestyle="--")
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
