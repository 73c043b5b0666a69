"""What every reader of rows gives: rows with their places, and a source that can be read again."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class LocatedRow(NamedTuple):
    """A raw row and its place in the source, such as "line 3"."""

    place: str
    row: Any


class UnreadRow(NamedTuple):
    """Stands in for a row that was passed over, being too large to be held; says so."""

    problem: str


class RowSource(NamedTuple):
    """A named source of rows that can be read any number of times (a generator: once)."""

    name: str
    read: Callable[[], Iterable[LocatedRow]]
    size: int | None
    """Number of rows, where it is known without reading."""
