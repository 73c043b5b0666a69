"""Rows over `max_length`: what becomes of each under both rules, before the training decides."""

from typing import NamedTuple

from ..preparation import MAX_DROPPED_SHARE, LengthRule
from .finding import Finding, Places, by_share
from .seen_row import SeenRow, Sizes


class Overlong(NamedTuple):
    """Rows over `max_length`, by what the two rules do with them."""

    max_length: int
    overlong_rows: str
    rows: int
    """All rows over it: what `overlong_rows: drop` leaves out."""
    cut: int
    """Those whose prompt `overlong_rows: cut_prompt` cuts."""
    dropped_anyway: int
    """Those that no rule saves: the completion alone fills `max_length`."""

    @property
    def dropped(self) -> int:
        """Rows left out by the rule that is set."""
        return self.rows if self.overlong_rows == "drop" else self.dropped_anyway


def fate(sizes: Sizes, max_length: int | None) -> str:
    """What a row meets: "whole", "too long" (dropped, or its prompt cut), or "dropped" anyway.

    The same arithmetic as `preparation.prepare_pairs`; a test holds the two together.
    """
    longest = max(sizes.chosen, sizes.rejected)
    if max_length is None or sizes.prompt + longest <= max_length:
        return "whole"
    return "too long" if max_length - longest >= 2 else "dropped"


class OverlongRows:
    """Counts the rows that a length rule cuts or leaves out.

    Args:
        rule: the configured one; sizes must be in tokens.
    """

    def __init__(self, rule: LengthRule) -> None:
        self._rule = rule
        self._rows = 0
        self._over = Places()
        self._dropped_anyway = 0

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        self._rows += 1
        met = fate(row.sizes, self._rule.max_length)
        if met != "whole":
            self._over.add(row.place)
        if met == "dropped":
            self._dropped_anyway += 1

    def summary(self) -> Overlong | None:
        """The counts; None without a limit."""
        if self._rule.max_length is None:
            return None
        over = self._over.count
        cut = over - self._dropped_anyway
        return Overlong(
            self._rule.max_length, self._rule.overlong_rows, over, cut, self._dropped_anyway
        )

    def findings(self) -> list[Finding]:
        """The rows over the limit."""
        counts = self.summary()
        if counts is None or counts.rows == 0:
            return []
        title = (
            f"Longer than max_length {counts.max_length}: overlong_rows: drop leaves out "
            f"{counts.rows}; cut_prompt cuts {counts.cut} prompts and leaves out "
            f"{counts.dropped_anyway}"
        )
        return [
            Finding(
                "overlong",
                by_share(counts.dropped, self._rows, MAX_DROPPED_SHARE),
                title,
                counts.rows,
                self._over.examples,
                "Rows that are left out teach nothing, and long answers are left out first, so the "
                "model sees another mixture than the file has. A cut prompt loses its beginning.",
                "Raise max_length if memory allows (`lite-orpo plan` tells), or set overlong_rows: "
                "cut_prompt where the end of a prompt is what matters.",
            )
        ]
