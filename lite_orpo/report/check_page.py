"""check.html: what `lite-orpo check` found, as one page without anything from outside.

The page is `check_page.html.jinja`; all text of the user's is escaped there by Jinja, and made
visible here.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from ..data.inspection.shortcuts import LEAST_PROMPTS
from ..data.inspection.survey import Survey
from .charts_svg import histogram_svg, share_svg
from .visible_text import make_visible

_TITLES = {
    "prompt": "Prompt",
    "chosen": "Chosen",
    "rejected": "Rejected",
    "sequence": "Prompt + longer answer",
}


def write_page(path: Path, survey: Survey, model: str | None) -> None:
    """Write the page.

    Args:
        path: where.
        survey: what was found.
        model: whose tokenizer was used; None without one.
    """
    path.write_text(page_of(survey, model), encoding="utf-8")


def page_of(survey: Survey, model: str | None) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Called on every text that is put in, before it is escaped; charts pass as they are.
        finalize=lambda value: make_visible(value) if type(value) is str else value,
    )
    environment.filters["with_code"] = _with_code
    source = files(__package__).joinpath("check_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        s=survey,
        model=model,
        lengths=_length_charts(survey),
        rules=_rules(survey),
        counts=_counts(survey),
        least_prompts=LEAST_PROMPTS,
    )


def _with_code(text: str) -> Any:
    """Escape a text, and set what stands in `back quotes` as code."""
    from markupsafe import Markup, escape

    parts = make_visible(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _length_charts(survey: Survey) -> list[dict[str, Any]]:
    from markupsafe import Markup

    limit = survey.overlong.max_length if survey.overlong is not None else None
    return [
        {
            "title": _TITLES[name],
            "summary": summary,
            "svg": Markup(  # noqa: S704 (our own drawing; its texts are escaped)
                histogram_svg(
                    summary.histogram,
                    _TITLES[name],
                    survey.unit,
                    limit if name == "sequence" else None,
                )
            ),
        }
        for name, summary in survey.lengths.items()
    ]


def _rules(survey: Survey) -> list[dict[str, Any]]:
    from markupsafe import Markup

    rules = []
    first = "token" if survey.unit == "tokens" else "word"
    for title, rule in (
        ("Length alone", survey.length_rule),
        (f"First {first} alone", survey.first_token_rule),
    ):
        if rule is None:
            continue
        svg = share_svg(rule.accuracy, rule.low, rule.high, title)
        rules.append({"title": title, "rule": rule, "svg": Markup(svg)})  # noqa: S704
    return rules


def _counts(survey: Survey) -> dict[str, int]:
    counts = {"serious": 0, "warning": 0, "note": 0}
    for finding in survey.findings:
        counts[finding.severity.value] += 1
    return counts
