"""`column_mapping`: the user's word on which column is what, where the names do not say it.

    column_mapping: {prompt: question, chosen: good, rejected: bad}

Keys are what a row needs, values the file's columns. A key with null says that there is no such
column: `{prompt: null}` takes the prompt from the messages, whatever column is called prompt. What
is named here is not guessed at any more; what is not, is found by its usual name. A column that
would be refused as lost context is left out by null, too: `{context: null}`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import DataError
from ..row_source import LocatedRow, RowSource

PARTS = ("prompt", "chosen", "rejected", "system", "tools")
NEEDED = ("chosen", "rejected")
# They hold what was said before in some data sets, and notes in others: never left out silently,
# only where the user's mapping has null for them.
CONTEXT_COLUMNS = (
    "context", "document", "history", "conversation_history", "conversation", "conversations",
    "messages",
)  # fmt: skip


class MappedRow(dict[str, Any]):
    """A row with the columns that the user named under the names of the parts.

    Attributes:
        mapping: the user's mapping.
        found: names of the columns as they stand in the file.
    """

    def __init__(self, row: Mapping[Any, Any], mapping: Mapping[str, str | None]) -> None:
        taken = {column for column in mapping.values() if column is not None} | set(mapping)
        super().__init__({name: value for name, value in row.items() if name not in taken})
        self.mapping = mapping
        self.found = [str(name) for name in row]
        for part, column in mapping.items():
            if column is not None and column in row:
                self[part] = row[column]


def check_column_mapping(
    mapping: Mapping[str, str | None] | None,
) -> Mapping[str, str | None] | None:
    """Refuse a mapping that cannot be meant.

    Args:
        mapping: as the user gave it; None or empty is none.

    Returns:
        The same mapping, None if it is empty.

    Raises:
        DataError: a key that is no part of a row, a value that is no column name, or one column
            for two parts.
    """
    if not mapping:
        return None
    if not isinstance(mapping, Mapping):
        raise DataError(f"column_mapping must be a mapping, found {mapping!r}")
    for part, column in mapping.items():
        if part in CONTEXT_COLUMNS and column is None:
            continue
        if part not in PARTS:
            turned = f"; write {column}: {part}" if column in PARTS else ""
            raise DataError(
                f"column_mapping: {part!r} is none of {', '.join(PARTS)}{turned} (the column's "
                "name in the file is the value)"
            )
        if column is None and part in NEEDED:
            raise DataError(f"column_mapping: {part} must be a column's name, found null")
        if column is not None and not isinstance(column, str):
            raise DataError(f"column_mapping: {part} must be a column's name, found {column!r}")
    named = [column for column in mapping.values() if column is not None]
    for column in named:
        if named.count(column) > 1:
            raise DataError(f"column_mapping: column {column!r} is named twice")
    return mapping


def with_mapped_columns(source: RowSource, mapping: Mapping[str, str | None] | None) -> RowSource:
    """The same source with its columns under the names that a row needs.

    Args:
        source: any source.
        mapping: a checked mapping; None changes nothing.

    Returns:
        A source whose rows are `MappedRow`s; what is no mapping is handed on as it is.
    """
    if mapping is None:
        return source

    def read() -> Iterator[LocatedRow]:
        for place, row in source.read():
            yield LocatedRow(place, MappedRow(row, mapping) if isinstance(row, Mapping) else row)

    return source._replace(read=read)
