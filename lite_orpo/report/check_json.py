"""check.json: all figures and findings of `lite-orpo check`, for programs.

Keys are only added within one version of the schema. Nothing here depends on time or machine:
the same data give the same file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..data.inspection.survey import Survey

SCHEMA = "lite-orpo-check/1"


def write_json(path: Path, survey: Survey, model: str | None) -> None:
    """Write the file.

    Args:
        path: where.
        survey: what was found.
        model: whose tokenizer was used; None without one.
    """
    # ASCII: a file can hold halves of characters, which UTF-8 cannot.
    text = json.dumps(as_json(survey, model), indent=1, ensure_ascii=True)
    path.write_text(text + "\n", encoding="ascii")


def as_json(survey: Survey, model: str | None) -> dict[str, Any]:
    """The survey as plain dictionaries, lists, texts and numbers."""
    return {
        "schema": SCHEMA,
        "data": {
            "source": survey.source,
            "rows": survey.rows,
            "readable": survey.readable,
            "unreadable": survey.unreadable,
            "stopped": survey.stopped,
            "is_part": survey.is_part,
        },
        "format": {"formats": survey.formats, "columns": survey.columns},
        "model": model,
        "unit": survey.unit,
        "lengths": _plain(survey.lengths),
        "overlong": _plain(survey.overlong),
        "pairs": {
            "duplicates": survey.duplicates,
            "repeated_prompts": survey.repeated_prompts,
            "swapped": survey.swapped,
            "chosen_longer": survey.chosen_longer,
            "equally_long": survey.equally_long,
        },
        "rules": {
            "length": _plain(survey.length_rule),
            "first_token": _plain(survey.first_token_rule),
            "first_tokens": _plain(survey.first_tokens),
        },
        "balance": {"column": survey.balance_column, "categories": _plain(survey.categories)},
        "held_out": _plain(survey.held_out),
        "unreadable_kinds": _plain(survey.unreadable_kinds),
        "findings": [_plain(finding) for finding in survey.findings],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields: NamedTuple = value  # type: ignore[assignment]
        return {key: _plain(item) for key, item in fields._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value
