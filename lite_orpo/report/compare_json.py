"""compare.json: every figure of a comparison with its interval, costs and answers, for programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.outcome import Result, read_comparison
from .json_file import write_json


def write_comparison_json(
    path: Path, results: Sequence[Result], *, about: dict[str, Any], prompts: Sequence[str]
) -> None:
    """Write the file, beside its place and renamed.

    Args:
        path: the file.
        results: the base model first, then the runs.
        about: base model, data, pairs.
        prompts: the sampled ones.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {
        **about,
        "reading": read_comparison(results),
        "prompts": list(prompts),
        "results": [_result(result) for result in results],
    }
    write_json(path, content)


def _result(result: Result) -> dict[str, Any]:
    figures = {} if result.evaluation is None else result.evaluation.overall.figures
    return {
        "label": result.label,
        "problem": result.problem,
        "figures": {key: figure.after._asdict() for key, figure in figures.items()},
        "cost": None if result.cost is None else result.cost._asdict(),
        "answers": list(result.answers),
    }
