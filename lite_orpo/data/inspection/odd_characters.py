"""Characters that nobody sees and the model does: control characters, broken encodings."""

import re

from .finding import Finding, Places, Severity
from .seen_row import SeenRow

# Control characters but tab and line breaks; marks that turn the direction of writing; a byte
# order mark in mid-text; U+FFFD, which stands where bytes could not be read.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]")


class OddCharacters:
    """Counts rows with such characters."""

    def __init__(self) -> None:
        self._rows = Places()
        self._seen: set[str] = set()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        found = {
            character
            for text in (row.prompt, row.chosen, row.rejected)
            if not text.isascii() or not text.isprintable()
            for character in _ODD.findall(text)
        }
        if found:
            self._rows.add(row.place)
            self._seen |= found

    def findings(self) -> list[Finding]:
        """The rows with odd characters."""
        if not self._rows.count:
            return []
        names = ", ".join(f"U+{ord(character):04X}" for character in sorted(self._seen)[:6])
        return [
            Finding(
                "odd_characters",
                Severity.NOTE,
                f"Characters that cannot be seen, or stand for broken text ({names})",
                self._rows.count,
                self._rows.examples,
                "The model learns to write them. U+FFFD stands where a file was once read in the "
                "wrong encoding: those words are lost.",
                "Take them out, or make the file again from its source with the right encoding.",
            )
        ]
