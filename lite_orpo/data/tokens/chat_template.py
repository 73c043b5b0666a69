"""A conversation -> three passages: prompt, chosen, rejected, as the chat template writes them.

Special tokens inside messages keep their places: they are wrapped in private characters before
rendering, and what is wrapped afterwards is somebody's words. The detour is taken only for rows
that hold such words, and only believed if the text is otherwise the one rendered without it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from ...errors import DataError, RowProblem
from ..formats.rows import ROLES, PreferenceRow
from .special_text import Passage, SpecialTokens, Tokenizer
from .template_limits import MAX_BYTES, MAX_SECONDS, RanTooLong, within_limits

# A template's own words (a system message, the frame around tools) are at most some thousands.
CHARACTERS_OF_ITS_OWN = 200_000
CHARACTERS_PER_CHARACTER = 10
SHOWN_OF_A_MESSAGE = 200

SYSTEM_ROLES = ("system", "developer")
SYSTEM_MESSAGE = "system message"
COMPLETION_WORDS = "words of a completion"


class TemplateRunaway(DataError):
    """The chat template loops or explodes: no row after this one will do better."""


class ChatPassages(NamedTuple):
    """What the tokenizer gets to see of a conversation."""

    prompt: Passage
    chosen: Passage
    rejected: Passage
    lost_words: bool
    """True: special tokens stand in the messages, and the template hides where they went."""
    unwritten: frozenset[str]
    """`SYSTEM_MESSAGE`, `COMPLETION_WORDS`: what the row says and the template leaves out."""


class _Rendered(NamedTuple):
    prompt: Passage
    chosen: Passage
    rejected: Passage


def chat_passages(
    row: PreferenceRow, tokenizer: Tokenizer, special: SpecialTokens, *, has_words: bool
) -> ChatPassages:
    """Apply the chat template, and cut what it writes into prompt and completions.

    Args:
        row: a checked row of message lists.
        tokenizer: a transformers tokenizer.
        special: its special tokens.
        has_words: whether special tokens stand in the row's own texts.

    Returns:
        The passages; the completions begin where the prompt ends.

    Raises:
        DataError: there is no chat template, or it is no valid Jinja.
        TemplateRunaway: it loops or explodes.
        RowProblem: it refuses the row, leaves no border between prompt and answer, or writes the
            prompt's messages elsewhere once an answer follows.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the tokenizer has no chat template; set "
            "chat_template_path (in Python: tokenizer.chat_template), or use plain text rows"
        )
    rendered = _render_row(row, tokenizer)
    border = _border(rendered)
    if _moves_prompt(row, tokenizer, rendered, border):
        raise RowProblem(
            "prompt",
            "is written differently by the chat template once an answer follows: messages of it "
            "then stand elsewhere or nowhere, so the model would not be trained on what it is "
            "asked later; use another template (chat_template_path)",
        )
    marked = _with_words(row, tokenizer, special, rendered) if has_words else None
    cut = _cut(marked or rendered, border, special)
    return ChatPassages(*cut, has_words and marked is None, _unwritten(row, rendered, border))


def row_texts(row: PreferenceRow) -> Iterator[str]:
    """Every text that a row brings: its strings, or those of its messages and tools."""
    for value in (row.prompt, row.chosen, row.rejected, row.tools):
        yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _render_row(row: PreferenceRow, tokenizer: Tokenizer) -> _Rendered:
    prompt: Any = row.prompt
    ends_in_assistant = prompt[-1]["role"] == "assistant"
    tools = row.tools
    return _Rendered(
        _render(
            tokenizer,
            prompt,
            "prompt",
            tools=tools,
            add_generation_prompt=not ends_in_assistant,
            continue_final_message=ends_in_assistant,
        ),
        _render(tokenizer, prompt + row.chosen, "chosen", tools=tools),
        _render(tokenizer, prompt + row.rejected, "rejected", tools=tools),
    )


def _render(
    tokenizer: Tokenizer, messages: Any, column: str, *, tools: Any, **options: bool
) -> Passage:
    def render() -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))

    try:
        text = within_limits(render)
    except RanTooLong:
        raise TemplateRunaway(
            f"the chat template ran for {MAX_SECONDS:.0f} seconds on one row; it loops: mend it or "
            "set another (chat_template_path)"
        ) from None
    except MemoryError:
        raise TemplateRunaway(
            f"the chat template wants more than {MAX_BYTES >> 20} MiB for one row: mend it or set "
            "another (chat_template_path)"
        ) from None
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no valid Jinja, line {error.lineno}: {error.message}"
        ) from None
    except SyntaxError as error:
        # Jinja makes Python of a template, and Python has limits of its own (20 nested blocks).
        raise DataError(f"the chat template is no valid Jinja: {error.msg}") from None
    except Exception as error:  # a template is a program: it can raise whatever Python can
        raise RowProblem(column, f"is refused by the chat template: {_in_words(error)}") from None
    if len(text) > CHARACTERS_OF_ITS_OWN:
        given = sum(map(len, _texts([messages, tools])))
        if len(text) > CHARACTERS_OF_ITS_OWN + CHARACTERS_PER_CHARACTER * given:
            raise TemplateRunaway(
                f"the chat template writes {len(text)} characters for a row of {given}; it loops: "
                "mend it or set another (chat_template_path)"
            )
    return Passage(text)


def _in_words(error: Exception) -> str:
    message = " ".join(str(error).split())
    if len(message) > SHOWN_OF_A_MESSAGE:
        message = f"{message[:SHOWN_OF_A_MESSAGE]}..."
    if isinstance(error, TemplateError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _with_words(
    row: PreferenceRow, tokenizer: Tokenizer, special: SpecialTokens, plain: _Rendered
) -> _Rendered | None:
    """The rendered row with the places of its own special tokens; None if they cannot be told."""
    opening, closing = _unused_characters([*row_texts(row), *(passage.text for passage in plain)])

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return special.pattern.sub(lambda match: opening + match.group() + closing, value)
        if isinstance(value, Mapping):
            return {key: mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(item) for item in value]
        return value

    marked = row._replace(**{name: mark(value) for name, value in row._asdict().items()})
    try:
        rendered = _render_row(marked, tokenizer)
    except RowProblem:
        return None  # the row itself was rendered, so this is the marks' doing
    passages = _Rendered(*(_unmarked(passage.text, opening, closing) for passage in rendered))
    same = all(found.text == known.text for found, known in zip(passages, plain, strict=True))
    return passages if same else None


def _unused_characters(texts: Iterable[str]) -> tuple[str, str]:
    used = set().union(*texts)
    # Private use: no white space, no letter, so no template's trim or upper touches them.
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    plane = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    return next(free, None) or next(plane), next(free, None) or next(plane)


def _unmarked(text: str, opening: str, closing: str) -> Passage:
    parts: list[str] = []
    spans = []
    length = 0
    # A mark without its fellow stays in the text, which then is not the known one.
    for part in re.split(f"{opening}([^{opening}{closing}]*){closing}", text):
        if len(parts) % 2:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return Passage("".join(parts), tuple(spans))


def _border(rendered: _Rendered) -> int:
    # Some templates write the generation prompt differently once the answer is there (an empty
    # thinking block, say): the prompt ends where all three renderings still agree.
    shared = _common_prefix_length(*(passage.text for passage in rendered))
    if shared == 0:
        raise RowProblem("prompt", "is changed from its first character on by the chat template")
    return shared


def _cut(rendered: _Rendered, border: int, special: SpecialTokens) -> _Rendered:
    for column in ("chosen", "rejected"):
        passage: Passage = getattr(rendered, column)
        if special.stands_across(passage.text, border) or passage.is_cut_inside_words(border):
            raise RowProblem(
                column,
                "is written by the chat template in a way that leaves no border between prompt "
                "and answer",
            )
    return _Rendered(
        rendered.prompt.before(border),
        rendered.chosen.after(border),
        rendered.rejected.after(border),
    )


def _common_prefix_length(prompt: str, chosen: str, rejected: str) -> int:
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return len(prompt)
    for length, characters in enumerate(zip(prompt, chosen, rejected, strict=False)):
        if len(set(characters)) > 1:
            return length
    return min(len(prompt), len(chosen), len(rejected))


def _moves_prompt(
    row: PreferenceRow, tokenizer: Tokenizer, rendered: _Rendered, border: int
) -> bool:
    """Whether words of the prompt's messages stand in its own rendering, but behind the border.

    So does a template that puts the system message before the last user's turn only as long as
    that is the last message of all (Mistral-7B-Instruct-v0.3).
    """
    text = rendered.prompt.text
    if border == len(text):
        return False
    # Words behind the border may be the generation prompt's own ("hi" stands in "think"), so a
    # suspicion is looked into by rendering once more, with each message's words in marks.
    contents = [content for content in _contents(row.prompt) if content]
    if all(
        content in text and text.find(content, max(0, border - len(content) + 1)) < 0
        for content in contents
    ):
        return False
    mark, _ = _unused_characters([*row_texts(row), *(passage.text for passage in rendered)])

    def marked(message: Any) -> Any:
        content = message.get("content")
        words = content.strip() if isinstance(content, str) else ""
        if not words:
            return message
        # Inside the white space around them, which templates trim.
        return {**message, "content": content.replace(words, f"{mark}{words}{mark}", 1)}

    prompt: Any = row.prompt
    try:
        again = _render_row(row._replace(prompt=[marked(each) for each in prompt]), tokenizer)
    except RowProblem:
        return True
    shared = _common_prefix_length(*(passage.text for passage in again))
    return mark in again.prompt.text[shared:]


def _contents(messages: Any, roles: tuple[str, ...] = ROLES) -> list[str]:
    return [
        message["content"].strip()
        for message in messages
        if isinstance(message.get("content"), str) and message["role"] in roles
    ]


def _unwritten(row: PreferenceRow, rendered: _Rendered, border: int) -> frozenset[str]:
    found = set()
    prompt = rendered.prompt.text[:border]
    if not all(_is_written(content, prompt) for content in _contents(row.prompt, SYSTEM_ROLES)):
        found.add(SYSTEM_MESSAGE)
    for completion, passage in ((row.chosen, rendered.chosen), (row.rejected, rendered.rejected)):
        for content in _contents(completion):
            # Its first words may also stand before the border, where the generation prompt has
            # them too, but behind the prompt's last words.
            if content in passage.text[border:] or _is_written(
                content, passage.text[_end_of_words(row.prompt, prompt) :]
            ):
                continue
            found.add(COMPLETION_WORDS)
    return frozenset(found)


def _end_of_words(messages: Any, text: str) -> int:
    last = _contents(messages)[-1:]
    place = text.rfind(last[0]) if last else -1
    return len(text) if place < 0 else place + len(last[0])


def _is_written(content: str, text: str) -> bool:
    """Whether all words of a message stand in a text in their order, whatever is between them."""
    if content in text:
        return True
    text = text.casefold()  # some templates write in capitals, escape, or move line breaks
    done = 0
    for word in re.findall(r"\w+", content.casefold()):
        place = text.find(word, done)
        if place < 0:
            return False
        done = place + len(word)
    return True
