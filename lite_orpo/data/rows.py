"""One preference row: which shapes are accepted, and what is wrong with one that is not.

Accepted: `prompt`, `chosen`, `rejected` as strings; the same as message lists; and message
lists without a prompt, where the messages that both completions begin with are the prompt.
Reading files is in `sources.py`, tokens are in `tokenization.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import RowProblem

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class PreferenceRow(NamedTuple):
    """A prompt and two completions, all strings or all message lists."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are message lists."""
        return not isinstance(self.prompt, str)


def parse_row(row: Any) -> PreferenceRow:
    """Check one raw row and bring it into the common shape.

    Args:
        row: a mapping as read from a file or data set.

    Returns:
        The row with an explicit prompt.

    Raises:
        RowProblem: a column is missing, empty, or of the wrong shape.
    """
    if not isinstance(row, Mapping):
        raise RowProblem("prompt", f"cannot be found: the row is {_kind(row)}, not an object")
    for column in ("chosen", "rejected"):
        _check_present(row, column)
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise RowProblem("rejected", "must be of the same kind as column 'chosen'")
    if row.get("prompt") is None:
        parsed = _split_off_prompt(row)
    else:
        _check_present(row, "prompt")
        parsed = PreferenceRow(row["prompt"], row["chosen"], row["rejected"])
    _check_kinds(parsed)
    if parsed.is_conversational:
        _check_conversation(parsed)
    if parsed.chosen == parsed.rejected:
        raise RowProblem("rejected", "is identical to column 'chosen': nothing to prefer")
    return parsed


def _check_present(row: Mapping[str, Any], column: str) -> None:
    if column not in row:
        near = [str(name) for name in row if str(name).strip().lower() == column]
        hint = f"; rename column {near[0]!r}" if near else f"; columns found: {_names(row)}"
        raise RowProblem(column, f"is missing{hint}")
    if row[column] is None:
        raise RowProblem(column, "is null")
    if isinstance(row[column], str) or column == "prompt":
        return
    if not isinstance(row[column], list):
        raise RowProblem(column, f"must be text or a list of messages, found {_kind(row[column])}")


def _split_off_prompt(row: Mapping[str, Any]) -> PreferenceRow:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        raise RowProblem(
            "prompt", "is missing, and plain text gives no sign where a prompt ends; add the column"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise RowProblem("prompt", "is missing and the two conversations share no first message")
    if shared == len(chosen) or shared == len(rejected):
        raise RowProblem("rejected", "adds no message of its own to the shared conversation")
    return PreferenceRow(chosen[:shared], chosen[shared:], rejected[shared:])


def _check_kinds(row: PreferenceRow) -> None:
    for column, value in zip(row._fields, row, strict=True):
        if isinstance(value, str):
            if column != "prompt" and not value.strip():
                raise RowProblem(column, "is empty or white space only")
        elif isinstance(value, list):
            _check_messages(column, value)
        else:
            raise RowProblem(column, f"must be text or a list of messages, found {_kind(value)}")
    if isinstance(row.prompt, str) != isinstance(row.chosen, str):
        kinds = ("text", "messages")
        prompt_kind, completion_kind = kinds if isinstance(row.prompt, str) else kinds[::-1]
        raise RowProblem(
            "prompt",
            f"is {prompt_kind} but the completions are {completion_kind}; give both in one form",
        )


def _check_conversation(row: PreferenceRow) -> None:
    prompt = list(row.prompt)
    for column, messages in (("chosen", row.chosen), ("rejected", row.rejected)):
        if list(messages[: len(prompt)]) == prompt:
            raise RowProblem(
                column,
                "begins with the messages of column 'prompt' again; leave one of the two out",
            )
        if messages[-1]["role"] != "assistant":  # type: ignore[index]
            raise RowProblem(
                column,
                f"ends with a message of role {messages[-1]['role']!r}, "  # type: ignore[index]
                "not with the assistant's answer",
            )


def _check_messages(column: str, messages: list[Any]) -> None:
    if not messages:
        raise RowProblem(column, "is an empty list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RowProblem(column, "must hold messages with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise RowProblem(
                column, f"has a message with role {message['role']!r}; known: {', '.join(ROLES)}"
            )
        content = message["content"]
        if not isinstance(content, str):
            raise RowProblem(column, f"has a message whose content is {_kind(content)}, not text")
    if column != "prompt" and not any(message["content"].strip() for message in messages):
        raise RowProblem(column, "is empty or white space only")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def _names(row: Mapping[str, Any]) -> str:
    names = [repr(str(name)) for name in row]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
