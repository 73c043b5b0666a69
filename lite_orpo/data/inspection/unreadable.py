"""Rows that the loader refuses, and files that it cannot read to the end."""

from typing import NamedTuple

from ...errors import RowProblem
from ..preparation import MAX_DROPPED_SHARE, PreparationReport
from .finding import Finding, Severity, by_share

_HARM = {
    "identical_pairs": (
        "The two answers are the same, so there is nothing to prefer: the odds-ratio term would "
        "push one text up and down at once.",
        "Delete these rows, or find out why both answers are the same.",
    ),
    "empty_texts": (
        "An empty answer has no token to score; a model that is taught one learns to say nothing.",
        "Delete these rows, or fill in the missing answers.",
    ),
    "unreadable_rows": (
        "Training leaves these rows out.",
        "Mend what the message says, or delete the rows.",
    ),
}
STOPS_AT_FIRST = "Training stops at the first of these rows (on_bad_row: error)."


class UnreadableKind(NamedTuple):
    """Rows refused for the same reason."""

    id: str
    column: str
    problem: str
    """The loader's words about the first of them."""
    rows: int
    places: tuple[str, ...]


class UnreadableRows:
    """Counts refused rows by reason, in the loader's own words.

    Args:
        source: name of the source, for messages.
        on_bad_row: "error" where training stops at the first of them.
    """

    def __init__(self, source: str, on_bad_row: str = "drop") -> None:
        self._stops = on_bad_row == "error"
        self._report = PreparationReport(source)
        self.stopped: str | None = None
        """Why the file could not be read to its end."""

    @property
    def count(self) -> int:
        """Refused rows."""
        return self._report.dropped

    def add(self, place: str, problem: RowProblem) -> None:
        """Count one refused row."""
        self._report.add_dropped(place, problem)

    def kinds(self) -> list[UnreadableKind]:
        """The reasons, most frequent first."""
        kinds = []
        for kind, rows in self._report.problems.most_common():
            examples = self._report.examples[kind]
            first = examples[0]
            places = tuple(example.place for example in examples)
            kinds.append(
                UnreadableKind(_id_of(first.problem), first.column, first.problem, rows, places)
            )
        return kinds

    def findings(self, readable: int) -> list[Finding]:
        """A finding for each reason.

        Args:
            readable: how many rows could be read.
        """
        findings = []
        if self.stopped is not None:
            findings.append(
                Finding(
                    "unreadable_file",
                    Severity.SERIOUS,
                    f"The file cannot be read to its end: {self.stopped}",
                    0,
                    (),
                    "Training refuses this file. All figures are of the rows before the break.",
                    "Mend the file at the place named, then check it again.",
                )
            )
        total = readable + self.count
        for kind in self.kinds():
            harm, advice = _HARM[kind.id]
            severity = by_share(kind.rows, total, MAX_DROPPED_SHARE)
            if self._stops:
                severity, harm = Severity.SERIOUS, STOPS_AT_FIRST
            findings.append(
                Finding(
                    kind.id,
                    severity,
                    f"Column {kind.column!r} {kind.problem}",
                    kind.rows,
                    kind.places,
                    harm,
                    advice,
                )
            )
        return findings


def _id_of(problem: str) -> str:
    if "identical" in problem or "of its own" in problem:
        return "identical_pairs"
    return "empty_texts" if "empty" in problem else "unreadable_rows"
