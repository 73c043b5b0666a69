"""One pass over the pairs (and one over the held-out ones) through all collectors.

Memory is counters and hashes, about 500 bytes a row. A new kind of finding is a new collector
in `_Collectors`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import DataError
from ..files.sources import RowSource
from ..preparation import LengthRule
from ..tokens.special_text import Tokenizer
from .balance import Balance, Category
from .duplicates import Duplicates
from .finding import Collector, Finding, Severity
from .held_out import HeldOut, compare_held_out
from .lengths import Lengths, LengthSummary
from .odd_characters import OddCharacters
from .outcome import find_refusal
from .overlong import Overlong, OverlongRows
from .prompt_texts import PromptTexts
from .reading import Limits, Progress, SourceReader
from .row_format import RowFormats
from .seen_row import RowReader
from .shortcuts import Direction, FirstTokenRule, RuleAccuracy
from .shortcuts import LengthRule as LongerRule
from .special_tokens import SpecialTokensInText
from .unreadable import UnreadableKind, UnreadableRows


class SurveyOptions(NamedTuple):
    """What is looked at, and how far."""

    rule: LengthRule = LengthRule(None, "drop")
    on_bad_row: str = "drop"
    balance_column: str | None = None
    max_rows: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True)
class Survey:
    """All that was found in a data set."""

    source: str
    readable: int
    unreadable: int
    stopped: str | None
    """Why the file could not be read to its end."""
    is_part: bool
    """Whether a limit ended the pass over the pairs before the data ended."""
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
        self.overlong = OverlongRows(_rule_of(tokenizer, options), options.on_bad_row)
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
            SpecialTokensInText(has_tokens),
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
        limits = Limits(options.max_rows, options.max_seconds)
        self._reader = SourceReader(tokenizer, limits, progress)
        self._rows = RowReader()
        self._collectors = _Collectors(tokenizer, options)
        self._unreadable = UnreadableRows(source.name, options.on_bad_row)
        self._readable = 0
        self._is_part = False

    def run(self, held_out: RowSource | None) -> Survey:
        for seen in self._reader.seen_rows(self._source, self._rows, self._unreadable):
            self._readable += 1
            for collector in self._collectors.all:
                collector.add(seen)
        self._is_part = self._reader.is_part
        self._refuse_if_nothing_was_read()
        self._collectors.balance.refuse_if_missing()
        if held_out is None:
            return self._survey(None, [])
        rule, on_bad_row = _rule_of(self._tokenizer, self._options), self._options.on_bad_row
        compared = compare_held_out(held_out, self._rows.prompts, self._reader, rule, on_bad_row)
        return self._survey(*compared)

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

    def _survey(self, held_out: HeldOut | None, more: list[Finding]) -> Survey:
        c = self._collectors
        findings = [f for collector in c.all for f in collector.findings()]
        total = self._readable + self._unreadable.count
        findings += self._unreadable.findings(self._readable) + more
        findings += find_refusal(self._unreadable, c.overlong.summary(), total)
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
            seconds=self._reader.seconds,
        )


def _rule_of(tokenizer: Tokenizer | None, options: SurveyOptions) -> LengthRule:
    """The rule for long rows; no limit where sizes are in characters."""
    return LengthRule(None, "drop") if tokenizer is None else options.rule


def _namer(tokenizer: Tokenizer | None) -> Callable[[str | int], str]:
    if tokenizer is None:
        return str
    return lambda first: str(tokenizer.decode([first]))
