"""Rows of JSON files: one a line, or the entries of one list, read without holding the file.

By the standard library and not by `datasets`, since a user needs the number of the line that is
wrong, and columns whose type changes from row to row have to arrive as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..row_source import LocatedRow, UnreadRow
from .bounded_file import MAX_LINE_BYTES, BoundedFile, NumberedLine

_SPACE = " \t\r\n"
_LIST_OF_ROWS = re.compile(r"\s*\[\s*(?:\{|$)")


def read_json_lines(path: Path) -> Iterator[LocatedRow]:
    """One row a line; blank lines are passed over.

    Raises:
        DataError: the file is unreadable or damaged, a line is no JSON, or it is one JSON list.
    """
    is_first = True
    with BoundedFile(path) as file:
        for line in file.lines():
            if line.text is None or line.text.strip():
                if is_first and _LIST_OF_ROWS.match(line.text or ""):
                    raise DataError(
                        f"{path} line {line.number}: the file is one JSON list, not one row a "
                        "line; name it .json"
                    )
                is_first = False
                yield LocatedRow(f"line {line.number}", _row_of(line, path))


def read_json(path: Path) -> Iterator[LocatedRow]:
    """A list of rows; or one row a line, as many files called .json have it.

    Raises:
        DataError: as `read_json_lines`, or the file is one object and no list.
    """
    first = _first_character(path)
    with BoundedFile(path) as file:
        if first == "[":
            yield from _ListReader(file.pieces(), path).entries()
        elif first:
            yield from _rows_of_lines(file.lines(), path)


def _first_character(path: Path) -> str:
    with BoundedFile(path) as file:
        beginnings = (text.lstrip(_SPACE)[:1] for text in file.pieces())
        return next((character for character in beginnings if character), "")


def _rows_of_lines(lines: Iterator[NumberedLine], path: Path) -> Iterator[LocatedRow]:
    filled = (line for line in lines if line.text is None or line.text.strip())
    try:
        located = [LocatedRow(f"line {a.number}", _row_of(a, path)) for a in islice(filled, 1)]
    except DataError as error:
        raise DataError(f"{error}; expected a list of rows, or one row a line") from None
    second = next(filled, None)
    if located and second is None and _is_wrapped_list(located[0].row):
        raise DataError(
            f"{path}: the file is one JSON object; expected a list of rows, or one row a line"
        )
    yield from located
    for line in chain([] if second is None else [second], filled):
        yield LocatedRow(f"line {line.number}", _row_of(line, path))


def _is_wrapped_list(row: Any) -> bool:
    """Whether this is `{"data": [{...}, ...]}` rather than a row."""
    if not isinstance(row, Mapping) or "chosen" in row:
        return False
    return any(
        isinstance(value, list)
        and value
        and isinstance(value[0], Mapping)
        and "role" not in value[0]
        for value in row.values()
    )


def _row_of(line: NumberedLine, path: Path) -> Any:
    if line.text is None:
        return UnreadRow(f"the line is longer than {MAX_LINE_BYTES / 2**20:g} MiB")
    try:
        return json.loads(line.text.rstrip(), object_pairs_hook=_object_without_repeats)
    except _RepeatedKey as error:
        raise DataError(f"{path} line {line.number}: key {error} stands there twice") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {line.number}: not valid JSON ({error.msg} at character "
            f"{error.pos + 1}); mend or delete the line"
        ) from None
    except ValueError:  # of a number with thousands of digits
        raise DataError(f"{path} line {line.number}: a number is too long to be read") from None
    except RecursionError:
        raise DataError(f"{path} line {line.number}: nested too deeply to be a row") from None


class _RepeatedKey(Exception):
    pass


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(repr(repeated[:40]))
    return row


class _ListReader:
    """Takes a JSON list apart entry by entry, with no more than one entry in memory."""

    def __init__(self, pieces: Iterator[str], path: Path) -> None:
        self._pieces = pieces
        self._path = path
        self._decoder = json.JSONDecoder(object_pairs_hook=_object_without_repeats)
        self._text = ""
        self._at = 0
        self._line = 1
        """Number of the line that `_text` begins with."""

    def entries(self) -> Iterator[LocatedRow]:
        if self._next_character() != "[":  # pragma: no cover (the caller has seen it)
            raise self._error("expected a list of rows", self._at)
        self._at += 1
        index = 0
        while self._next_character() != "]":
            if index:
                self._expect_comma()
            yield LocatedRow(f"entry {index}", self._entry(index))
            index += 1
        self._at += 1
        if self._next_character():
            raise self._error("something follows the list", self._at)

    def _expect_comma(self) -> None:
        if self._next_character() != ",":
            raise self._error("expected , or ] after an entry", self._at)
        self._at += 1
        self._next_character()

    def _entry(self, index: int) -> Any:
        wanted = 0
        while True:
            # A number at the end of what was read may go on; so may anything unfinished.
            is_all = not self._more(wanted)
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except _RepeatedKey as error:
                raise self._error(f"key {error} stands twice in entry {index}", self._at) from None
            except json.JSONDecodeError as error:
                if is_all or wanted >= MAX_LINE_BYTES:
                    long = "" if is_all else ", or the entry is longer than 16 MiB"
                    raise self._error(f"{error.msg}{long}; entry {index}", error.pos) from None
            except ValueError:
                raise self._error(f"a number in entry {index} is too long", self._at) from None
            except RecursionError:
                raise self._error(f"entry {index} is nested too deeply", self._at) from None
            else:
                if end < len(self._text) or is_all:
                    self._at = end
                    return value
            wanted = max(2 * wanted, 2**16)

    def _next_character(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1):
                return ""

    def _more(self, wanted: int) -> bool:
        """Have `wanted` characters after the current one, and say whether there is more to come."""
        if len(self._text) - self._at >= wanted:
            return True
        self._line += self._text.count("\n", 0, self._at)
        texts = [self._text[self._at :]]
        length, self._at = len(texts[0]), 0
        while length < wanted:
            text = next(self._pieces, None)
            if text is None:
                break
            texts.append(text)
            length += len(text)
        self._text = "".join(texts)
        return length >= wanted

    def _error(self, problem: str, position: int) -> DataError:
        line = self._line + self._text.count("\n", 0, position)
        return DataError(f"{self._path}: not valid JSON (line {line}: {problem}); mend the file")
