"""One preference row: from what a file holds to the common shape, or what is wrong with it.

`row_columns.py` finds the columns, `row_formats.py` is the table of formats, `row_values.py` checks
text and messages. Reading files is in `sources.py`, tokens are in `tokenization.py`.
"""

from typing import Any

from ...errors import RowProblem
from ..preference_row import ROLES, Message, PreferenceRow
from ..row_source import UnreadRow
from .row_columns import RowParts, read_parts
from .row_formats import format_of

__all__ = ["ROLES", "Message", "PreferenceRow", "columns_used", "describe_format", "parse_row"]


def parse_row(row: Any) -> PreferenceRow:
    """Check one raw row and bring it into the common shape.

    Args:
        row: a mapping as read from a file or data set.

    Returns:
        The row with an explicit prompt.

    Raises:
        RowProblem: a column is missing, empty, in doubt, too large, or of the wrong shape. It
            carries the column's name as it stands in the file.
    """
    parts = _parts(row)
    try:
        parsed = format_of(parts).read(parts)
        if parsed.chosen == parsed.rejected:
            problem = f"is identical to column {parts.column('chosen')!r}: nothing to prefer"
            raise RowProblem("rejected", problem)
    except RowProblem as problem:
        raise RowProblem(parts.column(problem.column), problem.problem) from None
    return parsed


def describe_format(row: Any) -> str:
    """How a row is read, for people, such as "HH-RLHF transcripts".

    Returns:
        The format's name, followed by the columns that have other names than usual; "no known
        format" where there is none. That the row can be used is not said by this.
    """
    try:
        parts = _parts(row)
        name = format_of(parts).name
    except RowProblem:
        return "no known format"
    others = [f"{part}: {name!r}" for part, name in sorted(parts.columns.items()) if part != name]
    return f"{name} ({', '.join(others)})" if others else name


def columns_used(row: Any) -> dict[str, str]:
    """Names in the file of the columns that are read as prompt, chosen, rejected, system, tools.

    Raises:
        RowProblem: the columns cannot be told.
    """
    parts = _parts(row)
    used = {part: parts.column(part) for part in ("chosen", "rejected")}
    if parts.prompts:
        used["prompt"] = parts.column("prompt")
    if parts.system:
        used["system"] = parts.column("system")
    if parts.tools:
        used["tools"] = parts.column("tools")
    return used


def _parts(row: Any) -> RowParts:
    if isinstance(row, UnreadRow):
        raise RowProblem("prompt", f"cannot be read: {row.problem}")
    return read_parts(row)
