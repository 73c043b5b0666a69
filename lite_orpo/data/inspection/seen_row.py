"""A readable row as the collectors see it: texts, sizes, first words, and rows like it before.

Only hashes and places of earlier rows are kept, about 500 bytes a row, never their texts. The
hash is blake2b: Python's own changes from one run to the next.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import RowProblem
from ..formats.rows import PreferenceRow
from ..tokens.tokenization import SpecialText, TokenizedPair


class Sizes(NamedTuple):
    """Lengths of one row's three texts, in tokens or in characters."""

    prompt: int
    chosen: int
    rejected: int


class SeenRow(NamedTuple):
    """One readable row."""

    place: str
    raw: Any
    prompt: str
    chosen: str
    rejected: str
    sizes: Sizes
    """In tokens (EOS included) where there is a tokenizer, in characters otherwise."""
    first_chosen: str | int
    """First token id, or first word."""
    first_rejected: str | int
    prompt_hash: int | None
    """None: the prompt is empty, and says nothing about the row."""
    half: int
    """0 or 1, the same for all rows of a prompt: what a rule is fitted on, and tried on."""
    copy_of: str | None
    """Place of an earlier row with the same three texts."""
    swap_of: str | None
    """Place of an earlier row with the same prompt, and chosen and rejected exchanged."""
    is_new_prompt: bool
    special_text: SpecialText | None
    """A special token among the words, and how it was read; None also without a tokenizer."""


class RowReader:
    """Turns parsed rows into seen ones, and remembers which there were."""

    def __init__(self) -> None:
        self._pairs: dict[int, str] = {}
        self.prompts: set[int] = set()

    def see(
        self,
        place: str,
        raw: Any,
        row: PreferenceRow,
        tokens: TokenizedPair | None,
        special_text: SpecialText | None = None,
    ) -> SeenRow:
        """Measure a row and compare it with those before.

        Args:
            place: where it stands in the source.
            raw: as the source gave it.
            row: parsed.
            tokens: its token ids; None: sizes are in characters.
            special_text: what the tokenisation says of special tokens among its words.

        Raises:
            RowProblem: it is no text.
        """
        prompt, chosen, rejected = (
            text_of(part) for part in (row.prompt, row.chosen, row.rejected)
        )
        for column, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            _check_characters(column, text)
        first_chosen: str | int
        first_rejected: str | int
        if tokens is None:
            sizes = Sizes(len(prompt), len(chosen), len(rejected))
            first_chosen, first_rejected = _first_word(chosen), _first_word(rejected)
        else:
            sizes = Sizes(len(tokens.prompt), len(tokens.chosen), len(tokens.rejected))
            first_chosen, first_rejected = tokens.chosen[0], tokens.rejected[0]
        prompt_hash = hash_of_prompt(prompt)
        hashes = _hash(chosen), _hash(rejected)
        pair_hash = _hash_numbers(prompt_hash or 0, *hashes)
        swap_hash = _hash_numbers(prompt_hash or 0, *hashes[::-1])
        seen = SeenRow(
            place=place,
            raw=raw,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            sizes=sizes,
            first_chosen=first_chosen,
            first_rejected=first_rejected,
            prompt_hash=prompt_hash,
            half=(pair_hash if prompt_hash is None else prompt_hash) & 1,
            copy_of=self._pairs.get(pair_hash),
            swap_of=self._pairs.get(swap_hash),
            is_new_prompt=prompt_hash is None or prompt_hash not in self.prompts,
            special_text=special_text,
        )
        self._pairs.setdefault(pair_hash, place)
        if prompt_hash is not None:
            self.prompts.add(prompt_hash)
        return seen


def text_of(value: Any) -> str:
    """The words of a prompt or completion, be it text or messages, without roles or template.

    So a prompt in plain text and the same one as a message count as the same.
    """
    if isinstance(value, str):
        return value
    return "\n".join(_message_text(message) for message in value)


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    rest = {key: v for key, v in message.items() if key not in ("role", "content") and v}
    if rest or (content and not text):
        # Tool calls and parts of content are no text, but they do tell two messages apart.
        rest["content"] = None if text else content
        text += json.dumps(rest, sort_keys=True, default=str)
    return text


def hash_of_prompt(prompt: str) -> int | None:
    """The same number for the same prompt in every run; None for an empty one."""
    return _hash(prompt) if prompt.strip() else None


def _check_characters(column: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can hold them ("\\ud83d" without its partner), and no tokenizer takes them.
        code = f"U+{ord(text[error.start]):04X}"
        raise RowProblem(column, f"holds half of a character ({code}); write it whole") from None


def _hash(text: str) -> int:
    data = text.strip().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _hash_numbers(*numbers: int) -> int:
    data = b"".join(number.to_bytes(8, "big") for number in numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _first_word(text: str) -> str:
    words = text.split(maxsplit=1)
    return words[0][:40] if words else ""
