"""What became of the rows of one source, counted and in words."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import RowProblem
from .tokenization import (
    KEPT_AS_TEXT,
    READ_AS_CONTROL,
    READ_AS_WRITTEN_BY_A_TEMPLATE,
    SpecialText,
)

EXAMPLES_SHOWN = 3

_SPECIAL_TEXT_LINES = {
    KEPT_AS_TEXT: "rows have special tokens as text: kept as text",
    READ_AS_WRITTEN_BY_A_TEMPLATE: (
        "rows of plain text begin with a special token: taken as written by a chat template, so "
        "the special tokens in them are control tokens; give message lists to have it certain"
    ),
    READ_AS_CONTROL: (
        "rows have special tokens as text, which this tokenizer or its chat template cannot keep "
        "as text: read as control tokens; take them out of the texts"
    ),
}


class DroppedRow(NamedTuple):
    """A row that was left out, and why."""

    place: str
    column: str
    problem: str


@dataclass
class PreparationReport:
    """What became of the rows of one source."""

    source: str
    kept: int = 0
    cut: int = 0
    dropped: int = 0
    special_text_rows: Counter[str] = field(default_factory=Counter)
    """Rows with special tokens in their texts, by how those were read."""
    first_special_texts: dict[str, str] = field(default_factory=dict)
    unseen_tools_rows: int = 0
    repeated_prompt_rows: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[DroppedRow]] = field(default_factory=dict)

    def add_dropped(self, place: str, problem: RowProblem) -> None:
        """Count a row that was left out, and keep the first few of each kind."""
        self.dropped += 1
        # Numbers differ from row to row ("71 tokens"); the kind of problem does not.
        kind = f"{problem.column} {problem.problem}".split(":")[0]
        kind = "".join("#" if c.isdigit() else c for c in kind)
        self.problems[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(DroppedRow(place, problem.column, problem.problem))

    def add_special_text(self, place: str, found: SpecialText) -> None:
        """Count a row with special tokens in its texts, and keep the first of each reading."""
        self.special_text_rows[found.reading] += 1
        self.first_special_texts.setdefault(found.reading, f"{found.token!r} at {place}")

    def lines(self) -> list[str]:
        """The report in words, one finding a line; the first line is the count."""
        total = self.kept + self.dropped
        lines = [f"{self.source}: {self.kept} of {total} rows kept"]
        if self.cut:
            lines.append(f"  {self.cut} prompts cut at their beginning to fit max_length")
        for kind, count in self.problems.most_common():
            first = self.examples[kind][0]
            places = ", ".join(example.place for example in self.examples[kind])
            more = ", ..." if count > EXAMPLES_SHOWN else ""
            lines.append(
                f"  {count} left out: column {first.column!r} {first.problem} ({places}{more})"
            )
        if self.repeated_prompt_rows:
            lines.append(
                f"  {self.repeated_prompt_rows} rows whose completions begin with the prompt "
                "again: the model sees it twice; take it out of the completions"
            )
        for reading, line in _SPECIAL_TEXT_LINES.items():
            if self.special_text_rows[reading]:
                count, place = self.special_text_rows[reading], self.first_special_texts[reading]
                lines.append(f"  {count} {line} (first: {place})")
        if self.unseen_tools_rows:
            lines.append(
                f"  {self.unseen_tools_rows} rows bring tools, which the chat template does not "
                "write: the model never sees them"
            )
        return lines
