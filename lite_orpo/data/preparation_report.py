"""What became of the rows of one source, counted and in words."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import RowProblem
from .tokens.chat_template import COMPLETION_WORDS, SYSTEM_MESSAGE
from .tokens.tokenization import (
    KEPT_AS_TEXT,
    READ_AS_CONTROL,
    READ_AS_WRITTEN_BY_A_TEMPLATE,
    SpecialText,
)

EXAMPLES_SHOWN = 3
TOOLS = "tools"

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

_UNWRITTEN_LINES = {
    TOOLS: "rows bring tools, which the chat template does not write: the model never sees them",
    SYSTEM_MESSAGE: (
        "rows have a system message, which the chat template does not write, or not all of it: "
        "the model never sees it"
    ),
    COMPLETION_WORDS: (
        "rows have completions of which the chat template leaves words out (thoughts, say): they "
        "are not trained on"
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
    unwritten_rows: Counter[str] = field(default_factory=Counter)
    """Rows with parts that the chat template leaves out, by part (`TOOLS`, ...)."""
    several_turns_rows: int = 0
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
        for part, line in _UNWRITTEN_LINES.items():
            if self.unwritten_rows[part]:
                lines.append(f"  {self.unwritten_rows[part]} {line}")
        if self.several_turns_rows:
            lines.append(
                f"  {self.several_turns_rows} rows have completions of several turns: all of them "
                "is trained on, the user's words too"
            )
        return lines
