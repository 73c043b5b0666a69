"""The value of a raw row's column that says where it comes from, or what it is about."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import DataError
from .files.column_mapping import MappedRow
from .row_source import RowSource

USUAL_COLUMNS = ("source", "category")
VALUES_KEPT = 200
_VALUE_LENGTH = 60
_MISSING = "(none)"


class Categories(NamedTuple):
    """A column, and its value in each of some rows."""

    column: str
    values: list[str]

    @property
    def say_something(self) -> bool:
        """Whether the values group the rows: several, and not a new one in almost every row."""
        found = len(set(self.values))
        return 2 <= found <= min(VALUES_KEPT, len(self.values) / 2)


def categories_of(source: RowSource, rows: Iterable[int], column: str | None) -> Categories | None:
    """Read the column of some rows again from their source.

    Args:
        source: as it was when the rows were numbered.
        rows: their numbers in the source, counted from 0.
        column: its name in the file or as mapped; None takes the first of `USUAL_COLUMNS` that
            the first row has.

    Returns:
        The values in the order of `rows`; None where no column was asked for and there is none.

    Raises:
        DataError: a column was asked for and no row has it.
    """
    numbers = list(rows)
    wanted, values, asked = set(numbers), dict[int, str](), column
    has_any, columns = False, list[str]()
    for number, (_, raw) in enumerate(source.read()):
        if number not in wanted:
            continue
        if not values:
            columns = [str(name) for name in columns_of(raw)]
            column = column or next((c for c in USUAL_COLUMNS if has_column(raw, c)), None)
            if column is None:
                return None
        has_any = has_any or has_column(raw, str(column))
        values[number] = category_of(raw, str(column))
    if asked is not None and not has_any:
        found = ", ".join(repr(name) for name in columns[:8])
        raise DataError(f"there is no column {asked!r} in any row; columns found: {found}")
    return Categories(str(column), [values.get(number, _MISSING) for number in numbers])


def has_column(raw: Any, column: str) -> bool:
    """Whether a raw row has the column, under its name in the file or as mapped."""
    return isinstance(raw, Mapping) and _name_in(raw, column) in raw


def category_of(raw: Any, column: str) -> str:
    """The value as a short text; "(none)" where there is none."""
    value = raw.get(_name_in(raw, column)) if isinstance(raw, Mapping) else None
    if value is None:
        return _MISSING
    text = str(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 3] + "..."


def columns_of(raw: Any) -> list[Any]:
    """Names of a raw row's columns, as they stand in the file."""
    if isinstance(raw, MappedRow):
        return list(raw.found)
    return list(raw) if isinstance(raw, Mapping) else []


def _name_in(raw: Any, column: str) -> str:
    """The column's name in the row: another one where it has been mapped."""
    if isinstance(raw, MappedRow) and column not in raw:
        return next((part for part, name in raw.mapping.items() if name == column), column)
    return column
