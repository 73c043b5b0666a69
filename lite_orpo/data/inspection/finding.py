"""What a collector reports: how many rows, which ones, the harm in plain words, what to do."""

import enum
from typing import NamedTuple, Protocol

from .seen_row import SeenRow

EXAMPLES_KEPT = 3


class Severity(str, enum.Enum):
    """How much a finding matters; the values stand in check.json."""

    SERIOUS = "serious"
    """Training on it teaches something wrong, or measures something wrong."""
    WARNING = "warning"
    """Worth a look before a long run."""
    NOTE = "note"
    """Good to know; often meant."""

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


class Finding(NamedTuple):
    """One thing that is wrong, or worth knowing."""

    id: str
    """A stable name, such as "swapped_pairs"."""
    severity: Severity
    title: str
    rows: int
    places: tuple[str, ...]
    """Up to three rows that have it, such as "line 12"."""
    harm: str
    """What it does to a training, for somebody who does this for the first time."""
    advice: str


class Collector(Protocol):
    """Looks at every readable row, holds counters only, and reports at the end."""

    def add(self, row: SeenRow) -> None:
        """Look at one row."""

    def findings(self) -> list[Finding]:
        """What was found; empty if nothing was."""


class Places:
    """A count of rows, and where the first three are."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, place: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self._first) < EXAMPLES_KEPT:
            self._first.append(place)

    @property
    def examples(self) -> tuple[str, ...]:
        """Up to three places."""
        return tuple(self._first)


def by_share(rows: int, total: int, serious_from: float) -> Severity:
    """Serious from that share of the rows on, a warning below."""
    return Severity.SERIOUS if rows >= serious_from * total else Severity.WARNING
