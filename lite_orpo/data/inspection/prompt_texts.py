"""Prompts that are empty, and prompts that stand in the completions once more."""

from .finding import Finding, Places, Severity
from .seen_row import SeenRow


class PromptTexts:
    """Counts rows whose prompt says nothing, or is said twice."""

    def __init__(self) -> None:
        self._empty = Places()
        self._again = Places()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        prompt = row.prompt.strip()
        if not prompt:
            self._empty.add(row.place)
        elif row.chosen.lstrip().startswith(prompt) and row.rejected.lstrip().startswith(prompt):
            self._again.add(row.place)

    def findings(self) -> list[Finding]:
        """Empty and repeated prompts."""
        found = []
        if self._empty.count:
            found.append(
                Finding(
                    "empty_prompts",
                    Severity.WARNING,
                    "Empty prompts",
                    self._empty.count,
                    self._empty.examples,
                    "The model is taught an answer to nothing; asked something, it may say it.",
                    "Fill in the prompts, or see whether they are in another column.",
                )
            )
        if self._again.count:
            found.append(
                Finding(
                    "prompt_in_completions",
                    Severity.WARNING,
                    "Both answers begin with the prompt again",
                    self._again.count,
                    self._again.examples,
                    "The model sees each prompt twice and learns to repeat the question before "
                    "it answers.",
                    "Take the prompt out of the answers, or leave the prompt column out if the "
                    "format allows.",
                )
            )
        return found
