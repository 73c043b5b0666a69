"""Characters that cannot be seen, or that turn a line round, as something that can."""

import unicodedata

_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
# Format characters that belong to what is seen: joiners inside emoji and scripts.
_KEPT = {"\u200c", "\u200d", "\ufe0f"}


def make_visible(text: str, *, marks_breaks: bool = True) -> str:
    """Replace control and format characters, and halves of characters, by their number.

    Args:
        text: anything a user's file can hold.
        marks_breaks: show line breaks and tabs as signs; otherwise they stay.

    Returns:
        Text that any terminal or page can show without being steered by it.
    """
    if text.isprintable():
        return text
    return "".join(_visible(character, marks_breaks) for character in text)


def _visible(character: str, marks_breaks: bool) -> str:
    if character in _NAMED:
        return _NAMED[character] if marks_breaks else character
    if character in _KEPT:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character
