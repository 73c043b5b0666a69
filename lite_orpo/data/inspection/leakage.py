"""Prompts that are in the training data and in the held-out data."""

from collections.abc import Set

from .finding import Finding, Places, by_share
from .seen_row import hash_of_prompt

_MANY = 0.01


class SharedPrompts:
    """Counts held-out rows whose prompt is trained on.

    Args:
        trained: hashes of the training data's prompts (`RowReader.prompts`).
    """

    def __init__(self, trained: Set[int]) -> None:
        self._trained = trained
        self.rows = 0
        self.shared = Places()

    def add(self, place: str, prompt: str) -> None:
        """Look at one held-out row."""
        self.rows += 1
        if hash_of_prompt(prompt) in self._trained:
            self.shared.add(place)

    def findings(self) -> list[Finding]:
        """The shared prompts."""
        if not self.shared.count:
            return []
        return [
            Finding(
                "prompts_in_both",
                by_share(self.shared.count, self.rows, _MANY),
                f"Held-out rows whose prompt is also trained on ({self.shared.count} of "
                f"{self.rows})",
                self.shared.count,
                self.shared.examples,
                "The held-out figures are to tell how the model does on prompts it has not seen. "
                "On these it has, so they look better than they are.",
                "Take these prompts out of one of the two files. The rows named are the held-out "
                "file's.",
            )
        ]
