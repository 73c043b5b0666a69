"""Special tokens that stand as text in somebody's words, and how they stay text.

A tokenizer reads "</s>" in a user's message as the control token. Here a text carries the places
of such words (`Passage`), and is tokenised so that they are spelled out while the control tokens
around them stay what they are. Where the words come from is in `tokenization.py` and
`chat_template.py`; tokens that are added but not special (`<think>`) are left alone, for answers
write them on purpose.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which is untyped

Span = tuple[int, int]


class Passage(NamedTuple):
    """A text, and where in it a special token is somebody's words and no control token."""

    text: str
    spoken: tuple[Span, ...] = ()

    def is_cut_inside_words(self, border: int) -> bool:
        """Whether a cut at `border` goes through one of the words."""
        return any(start < border < end for start, end in self.spoken)

    def before(self, border: int) -> "Passage":
        """The passage up to `border`."""
        return Passage(self.text[:border], tuple(span for span in self.spoken if span[1] <= border))

    def after(self, border: int) -> "Passage":
        """The passage from `border` on."""
        moved = ((start - border, end - border) for start, end in self.spoken if start >= border)
        return Passage(self.text[border:], tuple(moved))

    def followed_by(self, other: "Passage") -> "Passage":
        """Both passages as one."""
        length = len(self.text)
        moved = tuple((start + length, end + length) for start, end in other.spoken)
        return Passage(self.text + other.text, self.spoken + moved)


class SpecialTokens:
    """A tokenizer's special tokens as they were when this was made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        # The named ones (BOS, EOS, ...) are few; a family's <|eot_id|> is often only in the others.
        self.flags = {token.content: token for token in added if token.special}
        texts = {text for text in (*tokenizer.all_special_tokens, *self.flags) if text}
        self.texts = tuple(sorted(texts, key=lambda text: (-len(text), text)))
        self.ids = dict(
            zip(self.texts, tokenizer.convert_tokens_to_ids(list(self.texts)), strict=True)
        )
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        # The unknown token is what became of somebody's words, so it ends nothing (GPT-2's is its
        # EOS, which does).
        named = {tokenizer.eos_token_id}
        self.ending_ids = frozenset(self.ids.values()) - {tokenizer.unk_token_id} | named
        self._longest = max(map(len, self.texts), default=1)

    def first_in(self, texts: Iterable[str]) -> str | None:
        """The first special token that stands in one of the texts."""
        for text in texts:
            match = self.pattern.search(text)
            if match:
                return match.group()
        return None

    def spans(self, text: str) -> tuple[Span, ...]:
        """Where special tokens stand in a text."""
        return tuple(match.span() for match in self.pattern.finditer(text))

    def stands_across(self, text: str, border: int) -> bool:
        """Whether a special token begins before `border` and ends behind it."""
        near = self.pattern.finditer(text, max(0, border - self._longest + 1))
        for match in near:
            if match.start() >= border:
                return False
            if match.end() > border:
                return True
        return False


def encode(tokenizer: Tokenizer, text: str | list[str], **options: Any) -> Any:
    """Token ids of one text or of several, without any token that is not in them."""
    # verbose=False: over-long rows are our business, counted and shown, not a warning each.
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )["input_ids"]


def encode_words(
    tokenizer: Tokenizer, special: SpecialTokens, passage: Passage
) -> list[int] | None:
    """Tokenise a passage so that its `spoken` places are spelled out.

    The text is cut at its control tokens, as the tokenizer itself does it, and what lies between
    is tokenised with `split_special_tokens`. That the cutting is right for this tokenizer is
    tried on the passage itself: cut at every special token it has to give the tokenizer's own ids.

    Args:
        tokenizer: a transformers tokenizer.
        special: its special tokens.
        passage: a text with `spoken` places.

    Returns:
        The token ids, or None where this tokenizer cannot spell the words out.
    """
    every = special.spans(passage.text)
    control = [span for span in every if not _overlaps(span, passage.spoken)]
    spoken_ids = {special.ids.get(passage.text[start:end]) for start, end in passage.spoken}
    try:
        expected = list(encode(tokenizer, passage.text))
        for anchor in ("", "\n"):
            cut = _Cutter(tokenizer, special, anchor)
            if _joined(cut.pieces(passage.text, every)) != expected:
                continue
            pieces = list(cut.pieces(passage.text, control))
            if any(spoken_ids.intersection(piece.ids) for piece in pieces if not piece.is_control):
                return None  # the vocabulary itself holds the token as a word
            return _joined(pieces)
    except (TypeError, ValueError, NotImplementedError):
        pass  # a tokenizer that does not know split_special_tokens says so in one of these ways
    return None


class _Piece(NamedTuple):
    ids: list[int]
    is_control: bool


def _joined(pieces: Iterable[_Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


class _Cutter:
    """Tokenises a text in pieces between control tokens.

    `anchor` is put before a piece that follows a control token and its ids are taken off again:
    some tokenizers put a space before the first word of a text, but of no other piece.
    """

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens, anchor: str) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._anchor = anchor
        self._anchor_ids = self._words(anchor) if anchor else []

    def pieces(self, text: str, control: Iterable[Span]) -> Iterator[_Piece]:
        done = 0
        strips_next = False
        for start, end in control:
            token = text[start:end]
            flags = self._special.flags.get(token)
            yield self._between(text[done:start], done, strips_next, flags and flags.lstrip)
            yield _Piece([self._special.ids[token]], is_control=True)
            done, strips_next = end, bool(flags and flags.rstrip)
        yield self._between(text[done:], done, strips_next, False)

    def _between(self, text: str, place: int, strips_left: bool, strips_right: Any) -> _Piece:
        text = text.lstrip() if strips_left else text
        text = text.rstrip() if strips_right else text
        if not text:
            return _Piece([], is_control=False)
        if place and self._anchor:
            ids = self._words(self._anchor + text)
            if ids[: len(self._anchor_ids)] == self._anchor_ids:
                return _Piece(ids[len(self._anchor_ids) :], is_control=False)
        return _Piece(self._words(text), is_control=False)

    def _words(self, text: str) -> list[int]:
        return list(encode(self._tokenizer, text, split_special_tokens=True))


def _overlaps(span: Span, others: Iterable[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)
