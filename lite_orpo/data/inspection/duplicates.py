"""Pairs that come twice, prompts that come again, and pairs that contradict each other."""

from .finding import Finding, Places, Severity, by_share
from .seen_row import SeenRow

_MANY_COPIES = 0.2
_MANY_SWAPS = 0.01


class Duplicates:
    """Counts rows that another row before has already said, or said the other way round."""

    def __init__(self) -> None:
        self._rows = 0
        self.copies = Places()
        self.repeated_prompts = Places()
        self.swaps = Places()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        self._rows += 1
        if row.copy_of is not None:
            self.copies.add(f"{row.place} (as {row.copy_of})")
        elif row.swap_of is not None:
            self.swaps.add(f"{row.place} (against {row.swap_of})")
        elif not row.is_new_prompt:
            self.repeated_prompts.add(row.place)

    def findings(self) -> list[Finding]:
        """Copies, swapped pairs, and repeated prompts."""
        found = []
        if self.swaps.count:
            found.append(
                Finding(
                    "swapped_pairs",
                    by_share(self.swaps.count, self._rows, _MANY_SWAPS),
                    "Chosen and rejected exchanged: another row of the same prompt prefers the "
                    "other one of the same two answers",
                    self.swaps.count,
                    self.swaps.examples,
                    "The two rows cancel: the model is asked to prefer both, learns neither, and "
                    "no training can score both right.",
                    "Decide which one is right (a third opinion, or the newer label) and delete "
                    "the other.",
                )
            )
        if self.copies.count:
            found.append(
                Finding(
                    "duplicate_pairs",
                    by_share(self.copies.count, self._rows, _MANY_COPIES),
                    "The same pair again: prompt, chosen and rejected are those of an earlier row",
                    self.copies.count,
                    self.copies.examples,
                    "Each copy counts as one more example: the model learns these texts by heart, "
                    "and held-out figures lie if copies stand on both sides.",
                    "Keep one of each.",
                )
            )
        if self.repeated_prompts.count:
            found.append(
                Finding(
                    "repeated_prompts",
                    Severity.NOTE,
                    "The same prompt with other answers",
                    self.repeated_prompts.count,
                    self.repeated_prompts.examples,
                    "Often meant: several pairs of one prompt. But prompts with many pairs weigh "
                    "more than others, and a random split puts one prompt on both sides.",
                    "Split into training and held-out data by prompt, not by row.",
                )
            )
        return found
