"""One pass over the pairs (and one over the held-out ones) through all collectors.

Memory is counters and hashes, about 500 bytes a row. A new kind of finding is a new collector
in `_Collectors`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import DataError, RowProblem
from ..chat_template import TemplateRunaway
from ..parsed_rows import ParsedRow, parsed_chunks, tokenized
from ..preparation import MAX_DROPPED_SHARE, LengthRule
from ..rows import parse_row
from ..sources import LocatedRow, RowSource
from ..special_text import SpecialTokens, Tokenizer
from ..tokenization import RowTokenizer, TokenizedPair
from .balance import Balance, Category
from .duplicates import Duplicates
from .finding import Collector, Finding, Severity
from .leakage import SharedPrompts
from .lengths import Lengths, LengthSummary
from .odd_characters import OddCharacters
from .overlong import Overlong, OverlongRows
from .prompt_texts import PromptTexts
from .row_format import RowFormats
from .seen_row import RowReader, text_of
from .shortcuts import Direction, FirstTokenRule, RuleAccuracy
from .shortcuts import LengthRule as LongerRule
from .special_tokens import SpecialTokensInText
from .unreadable import UnreadableKind, UnreadableRows

Progress = Callable[[str, int], None]
_PROGRESS_EVERY = 200


class SurveyOptions(NamedTuple):
    """What is looked at, and how far."""

    rule: LengthRule = LengthRule(None, "drop")
    balance_column: str | None = None
    max_rows: int | None = None
    max_seconds: float | None = None


class HeldOut(NamedTuple):
    """What was seen of the held-out pairs."""

    source: str
    readable: int
    unreadable: int
    shared_prompts: int


@dataclass(frozen=True)
class Survey:
    """All that was found in a data set."""

    source: str
    readable: int
    unreadable: int
    stopped: str | None
    """Why the file could not be read to its end."""
    is_part: bool
    """Whether a limit ended the pass before the data ended."""
    formats: dict[str, int]
    columns: dict[str, int]
    unit: str
    """Of all lengths: "tokens", or "characters" where there was no tokenizer."""
    lengths: dict[str, LengthSummary]
    overlong: Overlong | None
    chosen_longer: int
    equally_long: int
    length_rule: RuleAccuracy | None
    first_token_rule: RuleAccuracy | None
    first_tokens: tuple[Direction, ...]
    duplicates: int
    repeated_prompts: int
    swapped: int
    balance_column: str | None
    categories: tuple[Category, ...]
    unreadable_kinds: tuple[UnreadableKind, ...]
    held_out: HeldOut | None
    findings: tuple[Finding, ...]
    """The worst first."""
    seconds: float

    @property
    def rows(self) -> int:
        """Rows looked at."""
        return self.readable + self.unreadable

    @property
    def is_serious(self) -> bool:
        """Whether a finding is serious."""
        return any(finding.severity is Severity.SERIOUS for finding in self.findings)


def survey_pairs(
    source: RowSource,
    *,
    held_out: RowSource | None = None,
    tokenizer: Tokenizer | None = None,
    options: SurveyOptions | None = None,
    progress: Progress = lambda name, rows: None,
) -> Survey:
    """Look at every row of a source once.

    Args:
        source: the pairs.
        held_out: pairs of the evaluation, compared with them.
        tokenizer: a transformers tokenizer; without one, lengths are in characters.
        options: limits, and what is counted.
        progress: told the source's name and how many rows have been read, now and then.

    Returns:
        Figures and findings.

    Raises:
        DataError: no row can be read, or the tokenizer cannot be used for such rows.
    """
    return _Pass(source, tokenizer, options or SurveyOptions(), progress).run(held_out)


class _Collectors:
    def __init__(self, tokenizer: Tokenizer | None, options: SurveyOptions) -> None:
        has_tokens = tokenizer is not None
        self.formats = RowFormats()
        self.lengths = Lengths()
        self.overlong = OverlongRows(options.rule if has_tokens else LengthRule(None, "drop"))
        self.duplicates = Duplicates()
        self.longer = LongerRule("tokens" if has_tokens else "characters")
        self.first = FirstTokenRule("token" if has_tokens else "word", _namer(tokenizer))
        self.balance = Balance(options.balance_column)
        self.all: tuple[Collector, ...] = (
            self.formats,
            self.lengths,
            self.overlong,
            self.duplicates,
            PromptTexts(),
            self.longer,
            self.first,
            self.balance,
            SpecialTokensInText(None if tokenizer is None else SpecialTokens(tokenizer).texts),
            OddCharacters(),
        )


class _Pass:
    def __init__(
        self,
        source: RowSource,
        tokenizer: Tokenizer | None,
        options: SurveyOptions,
        progress: Progress,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._options = options
        self._progress = progress
        self._started = time.perf_counter()
        self._reader = RowReader()
        self._row_tokenizer = None if tokenizer is None else RowTokenizer(tokenizer)
        self._collectors = _Collectors(tokenizer, options)
        self._unreadable = UnreadableRows(source.name)
        self._readable = 0
        self._is_part = False

    def run(self, held_out: RowSource | None) -> Survey:
        for parsed, tokens in self._parsed():
            try:
                if isinstance(parsed.row, RowProblem):
                    raise parsed.row
                seen = self._reader.see(parsed.place, parsed.raw, parsed.row, tokens)
            except RowProblem as problem:
                self._unreadable.add(parsed.place, problem)
                continue
            self._readable += 1
            for collector in self._collectors.all:
                collector.add(seen)
        self._refuse_if_nothing_was_read()
        other, shared = self._compare(held_out)
        return self._survey(other, shared)

    def _parsed(self) -> Iterator[tuple[ParsedRow, TokenizedPair | None]]:
        """The rows, each with its tokens where there is a tokenizer."""
        for chunk in parsed_chunks(self._rows_of(self._source, self._unreadable)):
            if self._row_tokenizer is None:
                yield from ((parsed, None) for parsed in chunk)
                continue
            for parsed, outcome in zip(chunk, tokenized(chunk, self._row_tokenizer), strict=False):
                if isinstance(outcome, TemplateRunaway):
                    raise DataError(f"{self._source.name} {parsed.place}: {outcome}")
                if isinstance(outcome, DataError):
                    raise outcome
                if isinstance(outcome, RowProblem):
                    yield parsed._replace(row=outcome), None
                else:
                    yield parsed, outcome.pair

    def _rows_of(self, source: RowSource, unreadable: UnreadableRows) -> Iterator[LocatedRow]:
        """The rows, until they end, cannot be read on, or a limit is met."""
        rows, limits = iter(source.read()), self._options
        count = 0
        while True:
            try:
                located = next(rows, None)
            except DataError as error:
                unreadable.stopped = str(error)
                return
            if located is None:
                break
            is_late = (
                limits.max_seconds is not None
                and time.perf_counter() - self._started > limits.max_seconds
            )
            if is_late or count == limits.max_rows:
                self._is_part = True
                break
            yield located
            count += 1
            if count % _PROGRESS_EVERY == 0:
                self._progress(source.name, count)
        self._progress(source.name, count)

    def _refuse_if_nothing_was_read(self) -> None:
        if self._readable:
            return
        unreadable = self._unreadable
        if unreadable.stopped is not None and not unreadable.count:
            raise DataError(unreadable.stopped)
        if not unreadable.count:
            raise DataError(f"{self._source.name}: no rows; the file or data set is empty")
        first = unreadable.kinds()[0]
        raise DataError(
            f"{self._source.name}: none of {unreadable.count} rows can be trained on: "
            f"{first.places[0]}: column {first.column!r} {first.problem}; mend these rows or "
            "delete them"
        )

    def _compare(self, held_out: RowSource | None) -> tuple[HeldOut | None, list[Finding]]:
        if held_out is None:
            return None, []
        shared = SharedPrompts(self._reader.prompts)
        unreadable = UnreadableRows(held_out.name)
        for located in self._rows_of(held_out, unreadable):
            try:
                row = parse_row(located.row)
            except RowProblem as problem:
                unreadable.add(located.place, problem)
                continue
            shared.add(located.place, text_of(row.prompt))
        found = [
            f._replace(id=f"held_out_{f.id}", title=f"Held-out pairs: {f.title}")
            for f in unreadable.findings(shared.rows)
        ]
        counts = HeldOut(held_out.name, shared.rows, unreadable.count, shared.shared.count)
        return counts, shared.findings() + found

    def _survey(self, held_out: HeldOut | None, more: list[Finding]) -> Survey:
        c = self._collectors
        findings = [f for collector in c.all for f in collector.findings()]
        findings += self._unreadable.findings(self._readable) + more + self._refusal()
        return Survey(
            source=self._source.name,
            readable=self._readable,
            unreadable=self._unreadable.count,
            stopped=self._unreadable.stopped,
            is_part=self._is_part,
            formats=c.formats.counts(),
            columns=c.formats.columns(),
            unit="characters" if self._tokenizer is None else "tokens",
            lengths=c.lengths.summaries(),
            overlong=c.overlong.summary(),
            chosen_longer=c.longer.chosen_longer,
            equally_long=c.longer.equally_long,
            length_rule=c.longer.accuracy(),
            first_token_rule=c.first.accuracy(),
            first_tokens=tuple(c.first.directions()),
            duplicates=c.duplicates.copies.count,
            repeated_prompts=c.duplicates.repeated_prompts.count,
            swapped=c.duplicates.swaps.count,
            balance_column=c.balance.column,
            categories=tuple(c.balance.categories()),
            unreadable_kinds=tuple(self._unreadable.kinds()),
            held_out=held_out,
            findings=tuple(sorted(findings, key=lambda f: (f.severity.rank, -f.rows))),
            seconds=time.perf_counter() - self._started,
        )

    def _refusal(self) -> list[Finding]:
        """What `train` would say of the data as a whole."""
        overlong = self._collectors.overlong.summary()
        dropped = self._unreadable.count + (overlong.dropped if overlong is not None else 0)
        total = self._readable + self._unreadable.count
        if dropped <= MAX_DROPPED_SHARE * total:
            return []
        return [
            Finding(
                "training_refused",
                Severity.SERIOUS,
                f"Training will refuse this data: {dropped} of {total} rows would be left out "
                f"(at most {MAX_DROPPED_SHARE:.0%} may be)",
                dropped,
                (),
                "A run on what is left would not be a run on what you have.",
                "Mend the rows that the other findings name.",
            )
        ]


def _namer(tokenizer: Tokenizer | None) -> Callable[[str | int], str]:
    if tokenizer is None:
        return str
    return lambda first: str(tokenizer.decode([first]))
