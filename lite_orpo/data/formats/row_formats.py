"""The formats a row can have, in one table: when a format fits, and how it becomes a pair.

To add a format, add a line to `FORMATS`; the first that fits is taken. Column names are found in
`row_columns.py` before.
"""

from collections.abc import Callable
from typing import NamedTuple

from ...errors import RowProblem
from ..preference_row import Message, PreferenceRow
from .row_columns import NO_ACCIDENT, RowParts, Value
from .transcripts import begins_transcript, is_transcript, split_transcripts


class RowFormat(NamedTuple):
    """A shape of rows, its name for people, and how one becomes a `PreferenceRow`."""

    name: str
    fits: Callable[[RowParts], bool]
    read: Callable[[RowParts], PreferenceRow]


def format_of(parts: RowParts) -> RowFormat:
    """The format that a row has.

    Raises:
        RowProblem: it has none, or two columns could be the prompt.
    """
    for candidate in FORMATS:
        if candidate.fits(parts):
            return candidate
    raise RowProblem(
        "prompt",
        "is missing, and plain text gives no sign where a prompt ends; add or fill the column, or "
        "set column_mapping: {prompt: ...}",
    )


# ---- when a format fits ----


def _are_transcripts(parts: RowParts) -> bool:
    if not _are_texts(parts):
        return False
    found = [is_transcript(str(value)) for value in (parts.chosen, parts.rejected)]
    return any(found) if parts.has_no_prompt else all(found)


def _are_texts(parts: RowParts) -> bool:
    return isinstance(parts.chosen, str)


def _is_whole_text(parts: RowParts) -> bool:
    return _are_texts(parts) and isinstance(parts.prompt, str)


def _is_text_for_turns(parts: RowParts) -> bool:
    return _is_whole_text(parts) and parts.speaks_in_turns


def _has_messages_and_texts(parts: RowParts) -> bool:
    return _are_texts(parts) and isinstance(parts.prompt, list)


def _is_implicit(parts: RowParts) -> bool:
    return not _are_texts(parts) and parts.has_no_prompt


def _is_told_twice(parts: RowParts) -> bool:
    """Whether the completions hold the conversation from its beginning, beside a prompt column."""
    if _are_texts(parts) or parts.has_no_prompt:
        return False
    values = list(parts.prompts.values())
    if any(isinstance(value, list) for value in values):
        prompt = parts.prompt
        return all(value[: len(prompt or ())] == prompt for value in (parts.chosen, parts.rejected))
    return all(
        _messages(value)[0]["role"] != "assistant" for value in (parts.chosen, parts.rejected)
    )


def _is_whole_messages(parts: RowParts) -> bool:
    return not _are_texts(parts) and isinstance(parts.prompt, list)


def _has_text_and_messages(parts: RowParts) -> bool:
    return not _are_texts(parts) and isinstance(parts.prompt, str)


# ---- how it becomes a pair ----


def _read_transcripts(parts: RowParts) -> PreferenceRow:
    for part, value in (("system", parts.system), ("tools", parts.tools)):
        if value:
            raise RowProblem(part, "has no place in a transcript; give messages")
    for name, prompt in parts.prompts.items():
        if isinstance(prompt, str) and not prompt.strip():
            continue
        if not isinstance(prompt, str) or not all(
            begins_transcript(prompt, str(value)) for value in (parts.chosen, parts.rejected)
        ):
            raise RowProblem(
                name,
                "is not what both transcripts begin with; to take the prompt from those, set "
                "column_mapping: {prompt: null}",
            )
    return split_transcripts(str(parts.chosen), str(parts.rejected))


def _read_text(parts: RowParts) -> PreferenceRow:
    return PreferenceRow(str(parts.prompt), parts.chosen, parts.rejected)


def _read_turns(parts: RowParts) -> PreferenceRow:
    return _conversation(
        parts, [_user_message(parts)], _answer(parts.chosen), _answer(parts.rejected)
    )


def _read_messages_and_texts(parts: RowParts) -> PreferenceRow:
    prompt = _messages(parts.prompt)
    _refuse_begun_answer(prompt, "and the completions are text")
    return _conversation(parts, prompt, _answer(parts.chosen), _answer(parts.rejected))


def _read_implicit(parts: RowParts) -> PreferenceRow:
    shared = _shared_messages(parts)
    if not shared:
        raise RowProblem("prompt", "is missing and the two conversations share no first message")
    return _after(parts, shared)


def _read_told_twice(parts: RowParts) -> PreferenceRow:
    shared = _shared_messages(parts)
    if any(isinstance(value, list) for value in parts.prompts.values()):
        return _after(parts, _messages(parts.prompt))
    if not shared:
        raise RowProblem("rejected", "and column 'chosen' begin with different messages")
    for name, prompt in parts.prompts.items():
        if not _is_told_in(str(prompt), shared):
            raise RowProblem(
                name,
                "is not among the messages that both conversations begin with; to take the prompt "
                "from those, set column_mapping: {prompt: null}",
            )
    return _after(parts, shared)


def _is_told_in(prompt: str, messages: list[Message]) -> bool:
    """Whether nothing of a prompt is lost by taking the messages in its place.

    It is one of them or several in a row, joined; or all of it stands in one, if it is long enough
    for that to be no accident, or a line of it.
    """
    text = _squeezed(prompt)
    contents = [_squeezed(message["content"]) for message in messages]
    for first in range(len(contents)):
        joined = ""
        for content in contents[first:]:
            joined = f"{joined} {content}".strip()
            if joined == text:
                return True
            if len(joined) > len(text):
                break
    lines = {_squeezed(line) for message in messages for line in message["content"].splitlines()}
    return text in lines or (
        len(text) >= NO_ACCIDENT and any(text in content for content in contents)
    )


def _read_messages(parts: RowParts) -> PreferenceRow:
    prompt = _messages(parts.prompt)
    return _conversation(parts, prompt, _messages(parts.chosen), _messages(parts.rejected))


def _read_text_and_messages(parts: RowParts) -> PreferenceRow:
    prompt = [_user_message(parts)]
    return _conversation(parts, prompt, _messages(parts.chosen), _messages(parts.rejected))


FORMATS: tuple[RowFormat, ...] = (
    RowFormat("HH-RLHF transcripts", _are_transcripts, _read_transcripts),
    RowFormat("text beside a system or tools column, as messages", _is_text_for_turns, _read_turns),
    RowFormat("text", _is_whole_text, _read_text),
    RowFormat(
        "message prompt, text completions", _has_messages_and_texts, _read_messages_and_texts
    ),
    RowFormat("messages, implicit prompt", _is_implicit, _read_implicit),
    RowFormat("messages, prompt also in a column", _is_told_twice, _read_told_twice),
    RowFormat("messages", _is_whole_messages, _read_messages),
    RowFormat("text prompt, message completions", _has_text_and_messages, _read_text_and_messages),
)


def _conversation(
    parts: RowParts, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> PreferenceRow:
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[: len(prompt)] == prompt:
            raise RowProblem(
                column,
                "begins with the messages of column 'prompt' again; leave one of the two out",
            )
        for message, verb in ((messages[-1], "ends"), (messages[0], "begins")):
            if message["role"] != "assistant":
                raise RowProblem(
                    column,
                    f"{verb} with a message of role {message['role']!r}, "
                    "not with the assistant's answer",
                )
    _refuse_begun_answer(prompt, "and the completions begin with another")
    return PreferenceRow(_with_system(parts, prompt), chosen, rejected, parts.tools)


def _refuse_begun_answer(prompt: list[Message], completions: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise RowProblem(
            "prompt",
            f"ends with a message of the assistant, {completions}: it is in doubt whether they go "
            "on with it or answer anew; end the prompt with what is answered, and give each "
            "answer whole",
        )


def _with_system(parts: RowParts, prompt: list[Message]) -> list[Message]:
    if not parts.system.strip():
        return prompt
    first = prompt[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": parts.system}, *prompt]
    if first["content"].strip() != parts.system.strip():
        raise RowProblem("system", "differs from the system message that the prompt begins with")
    return prompt


def _after(parts: RowParts, prompt: list[Message]) -> PreferenceRow:
    """The pair whose completions are what follows a prompt that both begin with."""
    chosen = _messages(parts.chosen)[len(prompt) :]
    rejected = _messages(parts.rejected)[len(prompt) :]
    if not chosen or not rejected:
        column = "chosen" if rejected else "rejected"
        raise RowProblem(column, "adds no message of its own to the shared conversation")
    return _conversation(parts, prompt, chosen, rejected)


def _shared_messages(parts: RowParts) -> list[Message]:
    shared: list[Message] = []
    for ours, theirs in zip(_messages(parts.chosen), _messages(parts.rejected), strict=False):
        if ours != theirs:
            break
        shared.append(ours)
    return shared


def _user_message(parts: RowParts) -> Message:
    prompt = str(parts.prompt)
    if not prompt.strip():
        raise RowProblem("prompt", "is empty or white space only, so there is no user message")
    return {"role": "user", "content": prompt}


def _answer(completion: object) -> list[Message]:
    return [{"role": "assistant", "content": str(completion)}]


def _messages(value: Value | None) -> list[Message]:
    assert isinstance(value, list)  # the format that fits says so
    return value


def _squeezed(value: object) -> str:
    return " ".join(str(value).split())
