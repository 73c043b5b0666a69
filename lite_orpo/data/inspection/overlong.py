"""Rows over `max_length`: what becomes of each under both rules, before the training decides."""

from typing import NamedTuple

from ..preparation import MAX_DROPPED_SHARE, LengthRule
from .finding import Finding, Places, Severity, by_share
from .seen_row import SeenRow, Sizes
from .unreadable import STOPS_AT_FIRST


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
        on_bad_row: "error" where training stops at the first row that it would leave out.
    """

    def __init__(self, rule: LengthRule, on_bad_row: str = "drop") -> None:
        self._stops = on_bad_row == "error"
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
        severity = by_share(counts.dropped, self._rows, MAX_DROPPED_SHARE)
        harm = (
            "Rows that are left out teach nothing, and long answers are left out first, so the "
            "model sees another mixture than the file has. A cut prompt loses its beginning."
        )
        if self._stops and counts.dropped:
            severity = Severity.SERIOUS
            # Under cut_prompt, it stops at those only that no rule saves.
            harm = STOPS_AT_FIRST.replace("these", f"the {counts.dropped} left-out")
        return [
            Finding(
                "overlong",
                severity,
                title,
                counts.rows,
                self._over.examples,
                harm,
                "Raise max_length if memory allows (`lite-orpo plan` tells), or set overlong_rows: "
                "cut_prompt where the end of a prompt is what matters.",
            )
        ]
