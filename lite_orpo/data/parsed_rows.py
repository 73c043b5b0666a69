"""Parsed rows, some hundred at a time: tokenizers are much faster on many texts in one call."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import DataError, RowProblem
from .files.sources import LocatedRow
from .formats.rows import PreferenceRow, parse_row
from .tokens.chat_template import row_texts
from .tokens.tokenization import Outcome, RowTokenizer

# Rows of a chunk; fewer where they are long, as all of them are held.
CHUNK_ROWS = 256
CHUNK_CHARACTERS = 4_000_000


class ParsedRow(NamedTuple):
    """A row's number in its source from 0, its place, as it was read, and what it says."""

    number: int
    place: str
    raw: Any
    """None where it cannot be read: such a row may be large, and nothing more is done with it."""
    row: PreferenceRow | RowProblem
    """Or why it cannot be read."""


def parsed_chunks(located: Iterable[LocatedRow]) -> Iterator[list[ParsedRow]]:
    """Parse rows in chunks; what came before an unreadable line comes before its error."""
    chunk: list[ParsedRow] = []
    characters = 0
    try:
        for number, (place, raw) in enumerate(located):
            try:
                row = parse_row(raw)
                characters += max(sum(map(len, row_texts(row))), _size_of_columns(raw))
                chunk.append(ParsedRow(number, place, raw, row))
            except RowProblem as problem:
                # As it was raised it holds the frames it came through, and they the raw row.
                known = RowProblem(problem.column, problem.problem)
                chunk.append(ParsedRow(number, place, None, known))
            if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except DataError:
        yield chunk
        raise
    yield chunk


def _size_of_columns(raw: Any) -> int:
    """Characters of the columns that are strings, those that are not used among them."""
    if not isinstance(raw, Mapping):
        return 0
    return sum(len(value) for value in raw.values() if isinstance(value, str))


def tokenized(chunk: list[ParsedRow], row_tokenizer: RowTokenizer) -> Iterator[Outcome]:
    """What became of each row of a chunk; a DataError is the last."""
    readable = [parsed.row for parsed in chunk if not isinstance(parsed.row, RowProblem)]
    outcomes = iter(row_tokenizer.rows(readable))
    for parsed in chunk:
        if isinstance(parsed.row, RowProblem):
            yield parsed.row
        elif (outcome := next(outcomes, None)) is not None:
            yield outcome
        else:
            return
