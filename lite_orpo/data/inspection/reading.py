"""Reads a source row by row, up to a limit, and tokenises where there is a tokenizer."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...errors import DataError, RowProblem
from ..files.sources import LocatedRow, RowSource
from ..parsed_rows import ParsedRow, parsed_chunks, tokenized
from ..tokens.chat_template import TemplateRunaway
from ..tokens.special_text import Tokenizer
from ..tokens.tokenization import RowTokenizer, TokenizedRow
from .seen_row import RowReader, SeenRow
from .unreadable import UnreadableRows

Progress = Callable[[str, int], None]
_PROGRESS_EVERY = 200


class Limits(NamedTuple):
    """Rows of each source, and seconds of all sources together; None: no limit."""

    max_rows: int | None
    max_seconds: float | None


class SourceReader:
    """Turns sources into seen rows, and counts what cannot be read.

    Args:
        tokenizer: a transformers tokenizer; without one, sizes are in characters.
        limits: how far to read; the clock starts here.
        progress: told the source's name and how many rows have been read, now and then.
    """

    def __init__(self, tokenizer: Tokenizer | None, limits: Limits, progress: Progress) -> None:
        self._row_tokenizer = None if tokenizer is None else RowTokenizer(tokenizer)
        self._limits = limits
        self._progress = progress
        self._started = time.perf_counter()
        self.is_part = False
        """Whether a limit ended the source read last before its rows did."""

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._started

    def seen_rows(
        self, source: RowSource, reader: RowReader, unreadable: UnreadableRows
    ) -> Iterator[SeenRow]:
        """The readable rows.

        Args:
            source: where they come from.
            reader: remembers the rows before.
            unreadable: takes the other rows, and why the source cannot be read to its end.

        Raises:
            DataError: the tokenizer cannot be used for such rows.
        """
        self.is_part = False
        for parsed, tokens in self._parsed(source, unreadable):
            try:
                if isinstance(parsed.row, RowProblem):
                    raise parsed.row
                pair = None if tokens is None else tokens.pair
                special_text = None if tokens is None else tokens.special_text
                seen = reader.see(parsed.place, parsed.raw, parsed.row, pair, special_text)
            except RowProblem as problem:
                unreadable.add(parsed.place, problem)
                continue
            yield seen

    def _parsed(
        self, source: RowSource, unreadable: UnreadableRows
    ) -> Iterator[tuple[ParsedRow, TokenizedRow | None]]:
        """The rows, each with its tokens where there is a tokenizer."""
        for chunk in parsed_chunks(self._rows_of(source, unreadable)):
            if self._row_tokenizer is None:
                yield from ((parsed, None) for parsed in chunk)
                continue
            for parsed, outcome in zip(chunk, tokenized(chunk, self._row_tokenizer), strict=False):
                if isinstance(outcome, TemplateRunaway):
                    raise DataError(f"{source.name} {parsed.place}: {outcome}")
                if isinstance(outcome, DataError):
                    raise outcome
                if isinstance(outcome, RowProblem):
                    yield parsed._replace(row=outcome), None
                else:
                    yield parsed, outcome

    def _rows_of(self, source: RowSource, unreadable: UnreadableRows) -> Iterator[LocatedRow]:
        """The rows, until they end, cannot be read on, or a limit is met."""
        rows, limits = iter(source.read()), self._limits
        count = 0
        while True:
            try:
                located = next(rows, None)
            except DataError as error:
                unreadable.stopped = str(error)
                return
            if located is None:
                break
            is_late = limits.max_seconds is not None and self.seconds > limits.max_seconds
            if is_late or count == limits.max_rows:
                self.is_part = True
                break
            yield located
            count += 1
            if count % _PROGRESS_EVERY == 0:
                self._progress(source.name, count)
        self._progress(source.name, count)
