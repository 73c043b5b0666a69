"""eval.json: every figure of an evaluation with its interval, for programs."""

from pathlib import Path
from typing import Any

from ..evaluation.figures import LABELS, Evaluation, GroupFigures
from ..evaluation.intervals import Estimate
from ..evaluation.reading import read_figures
from .json_file import write_json


def write_eval_json(
    path: Path,
    evaluation: Evaluation,
    *,
    about: dict[str, Any],
    trained: str,
    column: str | None,
) -> None:
    """Write the file, beside its place and renamed.

    Args:
        path: the file.
        evaluation: the figures.
        about: what was evaluated on what: model, base, data, settings.
        trained: what the trained model is called in sentences.
        column: what the groups are by.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {
        **about,
        "reading": read_figures(evaluation.overall, trained),
        "labels": {key: f"{label.name}: {label.meaning}" for key, label in LABELS.items()},
        "overall": _group(evaluation.overall),
        "column": column,
        "groups": [_group(group) for group in evaluation.groups],
    }
    write_json(path, content)


def _group(group: GroupFigures) -> dict[str, Any]:
    rule = group.length_rule
    return {
        **({} if group.name is None else {"value": group.name}),
        "pairs": group.pairs,
        "chosen_longer": rule.chosen_longer,
        "rejected_longer": rule.rejected_longer,
        "length_rule": {
            "takes": "longer" if rule.takes_longer else "shorter",
            **_estimate(rule.accuracy),
        },
        "figures": {
            key: {
                name: _estimate(part) for name, part in figure._asdict().items() if part is not None
            }
            for key, figure in group.figures.items()
        },
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return dict(estimate._asdict())
