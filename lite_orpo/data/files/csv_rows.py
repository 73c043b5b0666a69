"""Rows of CSV files: every cell is text, as it stands, with the line its row begins on.

An empty cell is null, since CSV has no other word for that.

By the standard library and not by pandas, which turns "4" into a number and the answers "None"
and "NA" into nothing. A list of messages has no cell type of its own; one written as JSON is read.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..row_source import LocatedRow
from .bounded_file import MAX_LINE_BYTES, BoundedFile, NumberedLine

DELIMITERS = (",", ";", "\t")


def read_csv(path: Path) -> Iterator[LocatedRow]:
    """One row a record; the first record names the columns.

    Comma, semicolon or tab between the cells, whichever the first line has most of.

    Raises:
        DataError: the file is unreadable or damaged, wrongly quoted, names a column twice, or a
            row has more or fewer cells than there are columns.
    """
    # The module's own limit of 128 KiB a cell is one for the process; longer answers exist.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with BoundedFile(path) as file:
        records = _Records(file.lines(), path)
        header = next(records, None)
        if header is None:
            return
        names = [name.strip() for name in header[1]]
        repeated = sorted({name for name in names if name and names.count(name) > 1})
        if repeated:
            raise DataError(f"{path} line 1: column {repeated[0][:40]!r} stands there twice")
        for line, cells in records:
            if len(cells) != len(names):
                raise DataError(
                    f"{path} line {line}: {len(cells)} cells where the first line names "
                    f"{len(names)} columns; text with commas, quotes or line breaks belongs in "
                    'quotes ("), a quote inside it is doubled ("")'
                )
            row = {name: _value(cell) for name, cell in zip(names, cells, strict=True) if name}
            yield LocatedRow(f"line {line}", row)


class _Records(Iterator[tuple[int, list[str]]]):
    """Records with the line each begins on; lines without any character are no records."""

    def __init__(self, lines: Iterator[NumberedLine], path: Path) -> None:
        self._path = path
        self._begins = 1
        self._record: list[str] = []
        self._lines = self._texts(lines)
        first = next(self._lines, "")
        delimiter = max(DELIMITERS, key=first.count)
        # A doubled quote is text; a single one after a space was to open the cell.
        self._late_quote = re.compile(rf'(?:^|{delimiter}) +"(?!")', re.MULTILINE)
        self._reader = csv.reader(self._with(first), delimiter=delimiter, strict=True)

    def __next__(self) -> tuple[int, list[str]]:
        while True:
            self._begins = self._reader.line_num + 1
            try:
                cells = next(self._reader)
            except csv.Error as error:
                raise DataError(
                    f"{self._path} line {self._begins}: not valid CSV: {_in_words(error)}"
                ) from None
            late = next((cell for cell in cells if re.match(' +"', cell)), None)
            if late is not None and self._late_quote.search("".join(self._record)):
                raise DataError(
                    f"{self._path} line {self._begins}: a space stands before the quote that opens "
                    f"a cell ({late[:20]!r}), which makes both part of the text; delete the spaces "
                    "after the delimiters"
                )
            if cells:
                return self._begins, cells

    def _with(self, first: str) -> Iterator[str]:
        if first:
            yield first
        yield from self._lines

    def _texts(self, lines: Iterator[NumberedLine]) -> Iterator[str]:
        record_bytes = 0
        begins = 0
        for line in lines:
            if self._begins != begins:
                begins, record_bytes = self._begins, 0
                self._record.clear()
            record_bytes += MAX_LINE_BYTES + 1 if line.text is None else len(line.text)
            if line.text is None or record_bytes > MAX_LINE_BYTES:
                raise DataError(
                    f"{self._path} line {begins}: the row is longer than "
                    f"{MAX_LINE_BYTES / 2**20:g} MiB; is a quote opened there and never closed?"
                )
            self._record.append(line.text)
            yield line.text


def _in_words(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote is opened in this row and never closed"
    if "expected after" in str(error):
        return (
            f'{error}: a quote inside quoted text is doubled (""), and a quoted cell ends with one'
        )
    return str(error)


def _value(cell: str) -> Any:
    text = cell.strip()
    if not text:
        return None
    if text.startswith("[") and text.endswith("]"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return cell
        if value and all(isinstance(item, dict) and "role" in item for item in value):
            return value
    return cell
