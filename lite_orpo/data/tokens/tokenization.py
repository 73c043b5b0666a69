"""Preference rows as token ids: prompt, chosen, rejected, tokenised apart.

Tokenised apart, the prompt is an exact prefix of both sequences by construction (tokenizers that
put a space before a text see the completion behind the prompt, and it is cut there). One BOS
begins the prompt where the tokenizer has one, one EOS ends each completion. Where the chat
template ends a turn with another token (Gemma's <end_of_turn>), a completion ends with that and
then the EOS: chat programs stop at the first, whatever knows only the tokenizer at the second.
Which rows are too long, and what then, is decided in `preparation.py`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import DataError, RowProblem
from ..formats.rows import PreferenceRow
from .chat_template import chat_passages, row_texts
from .rendered_text import generation_prompt, part_rendered
from .special_text import Passage, SpecialTokens, encode, encode_words
from .special_text import Tokenizer as Tokenizer

KEPT_AS_TEXT = "kept as text"
READ_AS_CONTROL = "read as control tokens"
READ_AS_WRITTEN_BY_A_TEMPLATE = "read as written by a chat template"

LINE_BREAK = "\n"


class TokenizedPair(NamedTuple):
    """Token ids of one pair; each completion follows the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class SpecialText(NamedTuple):
    """A special token that stands in a row's own texts, and how it was read."""

    token: str
    reading: str
    """`KEPT_AS_TEXT`; `READ_AS_CONTROL` where the tokenizer or the chat template leaves no other
    way; `READ_AS_WRITTEN_BY_A_TEMPLATE` for plain text whose prompt begins with a special token."""


class TokenizedRow(NamedTuple):
    """A row's token ids, and what became of special tokens in its texts (None: there are none)."""

    pair: TokenizedPair
    special_text: SpecialText | None
    unwritten: frozenset[str]
    """What the chat template leaves out: `SYSTEM_MESSAGE`, `COMPLETION_WORDS`."""


class _Passages(NamedTuple):
    prompt: Passage
    chosen: Passage
    rejected: Passage
    special_text: SpecialText | None
    unwritten: frozenset[str] = frozenset()


Outcome = TokenizedRow | RowProblem | DataError


def tokenize_pair(row: PreferenceRow, tokenizer: Tokenizer) -> TokenizedPair:
    """Apply the chat template where there are messages, and tokenise.

    Args:
        row: a checked row.
        tokenizer: a transformers tokenizer.

    Returns:
        Token ids with one BOS (if the tokenizer has one) and one EOS per completion.

    Raises:
        DataError: messages, but the tokenizer has no chat template, or one that loops or is no
            valid Jinja; or the tokenizer has no EOS.
        RowProblem: the chat template refuses the row, writes its prompt elsewhere once an answer
            follows, or leaves a completion empty or both the same.
    """
    outcome = RowTokenizer(tokenizer).rows([row])[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome.pair


def special_texts_in(row: PreferenceRow, tokenizer: Tokenizer) -> list[str]:
    """Special tokens that stand as text in the row's own content."""
    return RowTokenizer(tokenizer).special_texts_in(row)


class RowTokenizer:
    """Tokenises rows, many at a time, with one tokenizer as it is now.

    Args:
        tokenizer: a transformers tokenizer; its special tokens are read once, here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        self._bos = tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id
        self._opening: str | None = None
        self._is_blank: dict[int, bool] = {}
        # SentencePiece's way: a text begins with a space that is not there, " yes" for "yes". A
        # completion is no beginning: a model goes on with "yes" behind a line break.
        first, second, joined = map(self._encode_one, (LINE_BREAK, "a", f"{LINE_BREAK}a"))
        self._begins_with_space = False  # of a tokenizer that refuses these: it tells of each row
        if isinstance(first, list) and isinstance(second, list) and isinstance(joined, list):
            self._begins_with_space = joined != first + second

    def special_texts_in(self, row: PreferenceRow) -> list[str]:
        """Special tokens that stand as text in the row's own content, each once."""
        found: dict[str, None] = {}
        for text in row_texts(row):
            found.update(dict.fromkeys(self._special.pattern.findall(text)))
        return list(found)

    def rows(self, rows: Sequence[PreferenceRow]) -> list[Outcome]:
        """Tokenise rows, as `tokenize_pair` does it with one.

        Args:
            rows: checked rows.

        Returns:
            For each row, in order, its tokens or why it has none. A DataError is the last: it
            concerns every row, and none after it is looked at.
        """
        passages: list[_Passages | RowProblem | DataError] = []
        for row in rows:
            try:
                passages.append(self._passages(row))
            except RowProblem as problem:
                passages.append(problem)
            except DataError as error:
                passages.append(error)
                break
        ids = self._encode_all(
            [
                passage.text
                for each in passages
                if isinstance(each, _Passages)
                for passage in self._in_context(each)
            ]
        )
        outcomes: list[Outcome] = []
        done = 0
        for each in passages:
            if not isinstance(each, _Passages):
                outcomes.append(each)
                continue
            try:
                outcomes.append(self._finish(each, ids[done : done + 3]))
            except RowProblem as problem:
                outcomes.append(problem)
            done += 3
        return outcomes

    def _passages(self, row: PreferenceRow) -> _Passages:
        if self._eos is None:
            raise DataError(
                "the tokenizer has no EOS token, so a completion has no end; set "
                "tokenizer.eos_token"
            )
        if not row.is_conversational:
            return self._plain(str(row.prompt), str(row.chosen), str(row.rejected))
        found = self._special.first_in(row_texts(row))
        passages = chat_passages(row, self._tokenizer, self._special, has_words=found is not None)
        prompt, chosen, rejected, lost_words, unwritten = passages
        reading = READ_AS_CONTROL if lost_words else KEPT_AS_TEXT
        special_text = SpecialText(found, reading) if found is not None else None
        return _Passages(prompt, chosen, rejected, special_text, unwritten)

    def _plain(self, prompt: str, chosen: str, rejected: str) -> _Passages:
        whole = (Passage(prompt), Passage(chosen), Passage(rejected))
        if self._special.first_in((prompt, chosen, rejected)) is None:
            return _Passages(*whole, None)
        if self._opening is None:
            self._opening = generation_prompt(self._tokenizer)
        parted = part_rendered(prompt, chosen, rejected, self._special, self._opening)
        if parted is not None:
            prompt, chosen, rejected = parted
            whole = (Passage(prompt), Passage(chosen), Passage(rejected))
        # A BOS that begins the prompt and an EOS that ends a completion mean what they say.
        bodies = (self._without_bos(prompt), self._without_eos(chosen), self._without_eos(rejected))
        found = self._special.first_in(bodies)
        if found is None:
            return _Passages(*whole, None)
        if self._special.pattern.match(prompt.lstrip()):
            # Conversations are also handed over as text that a chat template has written already.
            return _Passages(*whole, SpecialText(found, READ_AS_WRITTEN_BY_A_TEMPLATE))
        asked, good, bad = (Passage(body, self._special.spans(body)) for body in bodies)
        return _Passages(asked, good, bad, SpecialText(found, KEPT_AS_TEXT))

    def _without_bos(self, prompt: str) -> str:
        bos = self._tokenizer.bos_token
        while bos and prompt.startswith(bos):
            prompt = prompt[len(bos) :]
        return prompt

    def _without_eos(self, completion: str) -> str:
        found = re.search(rf"(?:{re.escape(self._tokenizer.eos_token)}\s*)+\Z", completion)
        return completion[: found.start()] if found else completion

    def _encode_all(self, texts: list[str]) -> list[list[int] | str]:
        """Token ids of each text, in one call; of a text that has none, the reason."""
        if not texts:
            return []
        try:
            return list(encode(self._tokenizer, texts))
        except MemoryError:
            raise
        except Exception:  # half a surrogate pair, say: one text of many, so each is tried alone
            return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> list[int] | str:
        try:
            text.encode("utf-8")
            return list(encode(self._tokenizer, text))
        except UnicodeEncodeError:
            return "has characters that are no valid Unicode text; take them out"
        except MemoryError:
            raise
        except Exception as error:  # what it is depends on the tokenizer, so it is said
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            return f"is refused by the tokenizer: {first_line}"

    def _in_context(self, passages: _Passages) -> tuple[Passage, Passage, Passage]:
        """The prompt and the completions; these behind the prompt where that matters."""
        prompt, chosen, rejected = passages[:3]
        if self._begins_with_space:
            return prompt, prompt.followed_by(chosen), prompt.followed_by(rejected)
        return prompt, chosen, rejected

    def _finish(self, passages: _Passages, ids: Sequence[list[int] | str]) -> TokenizedRow:
        special_text = passages.special_text
        columns: list[list[int]] = []
        for column, passage, plain in zip(
            TokenizedPair._fields, self._in_context(passages), ids, strict=True
        ):
            if isinstance(plain, str):
                raise RowProblem(column, plain)
            words = (
                encode_words(self._tokenizer, self._special, passage) if passage.spoken else None
            )
            if passage.spoken and words is None and special_text is not None:
                special_text = special_text._replace(reading=READ_AS_CONTROL)
            columns.append(plain if words is None else words)
        prompt, chosen, rejected = columns
        if self._begins_with_space:
            chosen = self._behind(prompt, chosen, passages.chosen)
            rejected = self._behind(prompt, rejected, passages.rejected)
        pair = TokenizedPair(
            self._begun(prompt), self._ended(chosen, "chosen"), self._ended(rejected, "rejected")
        )
        if pair.chosen == pair.rejected:
            raise RowProblem(
                "rejected", "is identical to column 'chosen' once tokenised: nothing to prefer"
            )
        return TokenizedRow(pair, special_text, passages.unwritten)

    def _behind(self, prompt: list[int], both: list[int], completion: Passage) -> list[int]:
        """A completion's ids behind the prompt's, from those of both as one text."""
        if both[: len(prompt)] == prompt:
            return both[len(prompt) :]
        # A token stands across the border. The prompt keeps its own, and the completion is
        # tokenised behind a line break, so that no space is put before it.
        ids = self._ids(Passage(LINE_BREAK).followed_by(completion))
        anchor = self._ids(Passage(LINE_BREAK))
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._ids(completion)

    def _ids(self, passage: Passage) -> list[int]:
        words = encode_words(self._tokenizer, self._special, passage) if passage.spoken else None
        return list(encode(self._tokenizer, passage.text)) if words is None else words

    def _begun(self, prompt: list[int]) -> list[int]:
        bos = self._bos
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        while bos is not None and prompt[1:2] == [bos]:
            del prompt[0]
        if not prompt:
            raise RowProblem("prompt", "is empty and the tokenizer has no BOS to begin with")
        return prompt

    def _ended(self, ids: list[int], column: str) -> list[int]:
        # Templates such as ChatML put a line break behind the end of a turn; it is never generated.
        last = len(ids) - 1
        while last >= 0 and ids[last] not in self._special.ending_ids and self._blank(ids[last]):
            last -= 1
        if last >= 0 and ids[last] in self._special.ending_ids:
            ids = ids[: last + 1]
        while ids[-2:] == [self._eos, self._eos]:
            del ids[-1]
        if ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        if all(token in self._special.ending_ids for token in ids):
            raise RowProblem(column, "has no token left beside the EOS")
        return ids

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not self._tokenizer.decode([token]).strip()
        return self._is_blank[token]
