"""Which formats the rows are in, and which columns they have."""

from collections import Counter
from collections.abc import Mapping

from ..formats.rows import describe_format
from .finding import Finding, Places, Severity
from .seen_row import SeenRow

_COLUMNS_KEPT = 50


class RowFormats:
    """Counts rows by format; more than one in a file is a finding."""

    def __init__(self) -> None:
        self._places: dict[str, Places] = {}
        self._columns: Counter[str] = Counter()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        self._places.setdefault(describe_format(row.raw), Places()).add(row.place)
        if isinstance(row.raw, Mapping):
            for column in row.raw:
                if column in self._columns or len(self._columns) < _COLUMNS_KEPT:
                    self._columns[str(column)] += 1

    def counts(self) -> dict[str, int]:
        """Rows of each format, most first."""
        ordered = sorted(self._places.items(), key=lambda item: -item[1].count)
        return {name: places.count for name, places in ordered}

    def columns(self) -> dict[str, int]:
        """Rows that have each column, in the order of first appearance."""
        return dict(self._columns)

    def findings(self) -> list[Finding]:
        """Rows that are not in the format of the most."""
        if len(self._places) < 2:
            return []
        usual, *others = self.counts()
        odd = [self._places[name] for name in others]
        return [
            Finding(
                "mixed_formats",
                Severity.WARNING,
                f"Rows in {len(self._places)} formats: most are {usual}, others "
                + ", ".join(others),
                sum(places.count for places in odd),
                tuple(place for places in odd for place in places.examples)[:3],
                "Plain text gets no chat template and conversations do, so the model is taught two "
                "ways to begin an answer.",
                "Bring all rows into one format, or train on the parts one after the other.",
            )
        ]
