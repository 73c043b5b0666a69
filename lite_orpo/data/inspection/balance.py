"""How the rows are spread over a column that says where they come from, or what they are about."""

from typing import NamedTuple

from ...errors import DataError
from ..row_category import USUAL_COLUMNS, VALUES_KEPT, category_of, columns_of, has_column
from .finding import Finding, Places, Severity
from .seen_row import SeenRow

_OTHERS = "(others)"
_DOMINATES_FROM = 0.8
_RARE_BELOW = 0.01


class Category(NamedTuple):
    """One value of the column."""

    value: str
    rows: int
    chosen_longer: int
    """Rows of it whose chosen text is the longer one."""


class Balance:
    """Counts rows by the value of one column.

    Args:
        column: its name, in the file or as mapped; None takes the first of `USUAL_COLUMNS` that
            the first row has.
    """

    def __init__(self, column: str | None = None) -> None:
        self._is_asked_for = column is not None
        self.column = column
        self._first: SeenRow | None = None
        self._rows_with_it = 0
        self._places: dict[str, Places] = {}
        self._longer: dict[str, int] = {}
        self._rows = 0

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        if self._first is None:
            self._first = row
            if not self._is_asked_for:
                self.column = next((c for c in USUAL_COLUMNS if has_column(row.raw, c)), None)
        if self.column is None:
            return
        self._rows += 1
        self._rows_with_it += has_column(row.raw, self.column)
        value = category_of(row.raw, self.column)
        if value not in self._places and len(self._places) >= VALUES_KEPT:
            value = _OTHERS
        self._places.setdefault(value, Places()).add(row.place)
        longer = row.sizes.chosen > row.sizes.rejected
        self._longer[value] = self._longer.get(value, 0) + longer

    def refuse_if_missing(self) -> None:
        """Say so where a column was asked for and no row has it.

        Raises:
            DataError: that.
        """
        if not self._is_asked_for or self._rows_with_it or self._first is None:
            return
        found = ", ".join(repr(str(name)) for name in columns_of(self._first.raw)[:8])
        raise DataError(
            f"there is no column {self.column!r} to count by in any row; at {self._first.place}, "
            f"columns found: {found}"
        )

    def categories(self) -> list[Category]:
        """The values, most frequent first; empty where the column says nothing.

        It says nothing where it has one value, or a new one in almost every row (a number of
        the row, a whole text).
        """
        values = len(self._places)
        if values < 2 or _OTHERS in self._places or values > self._rows / 2:
            return []
        found = [
            Category(value, places.count, self._longer[value])
            for value, places in self._places.items()
        ]
        return sorted(found, key=lambda category: (-category.rows, category.value))

    def findings(self) -> list[Finding]:
        """One value that drowns the others, or values that hardly occur."""
        categories = self.categories()
        if not categories:
            return []
        harm = (
            "The model learns what most rows are about. What is rare in the data is learnt last, "
            "and its failures do not show in an average over all rows."
        )
        most = categories[0]
        if most.rows >= _DOMINATES_FROM * self._rows:
            rest = [self._places[c.value] for c in categories[1:]]
            return [
                Finding(
                    "one_category_dominates",
                    Severity.WARNING,
                    f"{most.rows / self._rows:.0%} of the rows have {self.column} {most.value!r}",
                    most.rows,
                    self._places[most.value].examples,
                    harm,
                    f"Add rows of the {len(rest)} other values, or leave out some of this one.",
                )
            ]
        rare = [c for c in categories if c.rows < _RARE_BELOW * self._rows]
        if not rare:
            return []
        names = ", ".join(repr(c.value) for c in rare[:3]) + (", ..." if len(rare) > 3 else "")
        return [
            Finding(
                "rare_categories",
                Severity.NOTE,
                f"{len(rare)} of {len(categories)} values of {self.column} have less than 1 % of "
                f"the rows each: {names}",
                sum(c.rows for c in rare),
                tuple(p for c in rare for p in self._places[c.value].examples)[:3],
                harm,
                "Add rows of these, or do not expect the model to have learnt them.",
            )
        ]
