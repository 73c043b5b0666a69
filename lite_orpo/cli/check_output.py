"""What `lite-orpo check` prints: a few lines of figures, then the findings as a table."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.inspection.finding import Finding, Severity
from ..data.inspection.shortcuts import LEAST_PROMPTS, RuleAccuracy
from ..data.inspection.survey import Survey
from ..report.visible_text import make_visible

_STYLES = {Severity.SERIOUS: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "green"}


def print_survey(console: Console, survey: Survey, model: str | None) -> None:
    """Print figures and findings.

    Args:
        console: where.
        survey: what was found.
        model: whose tokenizer was used; None without one.
    """
    console.print(Text(make_visible(survey.source), style="bold"), soft_wrap=True)
    pace = ""
    if survey.seconds >= 1:
        speed = survey.rows / survey.seconds * 60
        pace = f" ({survey.seconds:.1f} s, {speed:,.0f} rows a minute)"
    rows = [
        ("Pairs", pairs_in_words(survey) + pace),
        ("Format", formats_in_words(survey)),
        ("Columns", ", ".join(survey.columns)),
        ("Repeats", repeats_in_words(survey)),
        ("Shortcuts", shortcuts_in_words(survey)),
    ]
    for label, text in rows:
        line = Text.assemble((f"{label:>10} ", "bold cyan"), make_visible(text))
        console.print(line, soft_wrap=True)
    console.print(_lengths(survey, model))
    if survey.categories:
        console.print(_balance(survey))
    if survey.findings:
        console.print(_findings(survey.findings))
    else:
        console.print("  Nothing was found. Read a few pairs yourself all the same.")


def pairs_in_words(survey: Survey) -> str:
    """Such as "400 pairs, 2 rows cannot be trained on"."""
    text = f"{survey.readable:,} pairs"
    if survey.is_part:
        text = f"the first {text}"
    if survey.unreadable:
        rows = "row" if survey.unreadable == 1 else "rows"
        text += f", {survey.unreadable:,} {rows} cannot be trained on"
    if survey.stopped is not None:
        text += ", and the file cannot be read to its end"
    return text


def formats_in_words(survey: Survey) -> str:
    """Such as "conversations with the prompt inside"."""
    if len(survey.formats) == 1:
        return next(iter(survey.formats))
    return ", ".join(f"{rows:,} {name}" for name, rows in survey.formats.items())


def repeats_in_words(survey: Survey) -> str:
    """Copies, swapped pairs and shared prompts in one line."""
    parts = [
        f"{survey.duplicates:,} duplicate pairs",
        f"{survey.repeated_prompts:,} repeated prompts",
        f"{survey.swapped:,} swapped pairs",
    ]
    if survey.held_out is not None:
        held_out = survey.held_out
        parts.append(
            f"{held_out.shared_prompts:,} of {held_out.readable:,} held-out prompts also trained on"
        )
    return ", ".join(parts)


def shortcuts_in_words(survey: Survey) -> str:
    """What the length and the first word alone get right."""
    text = f"chosen is longer in {survey.chosen_longer / survey.readable:.0%}"
    if survey.length_rule is not None:
        text += f"; length alone would score {_in_words(survey.length_rule)}"
    if survey.first_token_rule is not None:
        first = "token" if survey.unit == "tokens" else "word"
        text += f", the first {first} {_in_words(survey.first_token_rule)}"
    if survey.length_rule is None and survey.first_token_rule is None:
        text += (
            "; length and first words: too few prompts to judge "
            f"(fewer than {LEAST_PROMPTS} in a half)"
        )
    return text


def _in_words(rule: RuleAccuracy) -> str:
    return f"{rule.accuracy:.2f} ({rule.low:.2f} to {rule.high:.2f})"


def _lengths(survey: Survey, model: str | None) -> Table:
    where = "characters (no --model)" if model is None else f"tokens of {make_visible(model)}"
    table = Table(title=Text(f"Lengths in {where}"), title_justify="left", box=None)
    for heading in ("", "mean", "median", "95 %", "longest"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, summary in survey.lengths.items():
        figures = (f"{summary.mean:.0f}", summary.median, summary.p95, summary.longest)
        table.add_row(name, *(str(figure) for figure in figures))
    return table


def _balance(survey: Survey) -> Table:
    title = Text(f"By {make_visible(str(survey.balance_column))}")
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("value")
    for heading in ("rows", "share", "chosen is longer"):
        table.add_column(heading, justify="right")
    for category in survey.categories[:12]:
        table.add_row(
            Text(make_visible(category.value)),
            f"{category.rows:,}",
            f"{category.rows / survey.readable:.1%}",
            f"{category.chosen_longer / category.rows:.0%}",
        )
    if len(survey.categories) > 12:
        table.add_row(f"{len(survey.categories) - 12} more", "", "", "")
    return table


def _findings(findings: tuple[Finding, ...]) -> Table:
    table = Table(title="Findings", title_justify="left", show_lines=True, expand=True)
    table.add_column("level", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("what", ratio=3, overflow="fold")
    table.add_column("harm, and what to do", ratio=4, overflow="fold")
    for finding in findings:
        what = Text(make_visible(finding.title))
        if finding.places:
            more = ", ..." if finding.rows > len(finding.places) else ""
            what.append(f"\n{make_visible(', '.join(finding.places))}{more}", style="dim")
        advice = Text(make_visible(finding.harm))
        advice.append(f"\n{make_visible(finding.advice)}", style="bold")
        rows = f"{finding.rows:,}" if finding.rows else ""
        level = Text(finding.severity.value, style=_STYLES[finding.severity])
        table.add_row(level, rows, what, advice)
    return table
