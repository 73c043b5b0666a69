"""The values of a row: text, messages and tools, checked, bounded and in one form.

Which column is what is decided in `row_columns.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

from ...errors import RowProblem
from ..preference_row import ROLES, Message

# Some 250,000 tokens; four times as much took a tokenizer up to ten seconds and 1.2 GB.
MAX_ROW_CHARACTERS = 2**20
MAX_DEPTH = 40
_NODE_COST = 8  # of a list entry or key: empty ones in millions are large, too


def kind_of(value: Any) -> str:
    """A value's type in the words of a data file."""
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A value for a message: short, and never one whose text depends on a hash seed."""
    if not isinstance(value, str):
        return kind_of(value)
    return repr(value if len(value) <= 40 else f"{value[:40]}...")


def plain(value: Any) -> Any:
    """Tuples, and numpy's arrays and texts, as what a file would have held; the rest as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def check_text(column: str, text: str) -> str:
    """The text as it is, if it can be tokenised.

    Raises:
        RowProblem: it is too large, has half a surrogate pair, or is a message list as text.
    """
    if len(text) > MAX_ROW_CHARACTERS:
        raise RowProblem(column, _too_large(len(text)))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowProblem(
            column, f"holds half of a character ({half} at character {error.start})"
        ) from None
    if _is_message_list_as_text(text):
        raise RowProblem(
            column,
            "is a list of messages written as text; store it as a list (JSON lines, parquet)",
        )
    return text


def check_column_text(column: str, text: str) -> str:
    """The text as `check_text` has it, of a whole column: no JSON of messages either.

    Raises:
        RowProblem: as `check_text`, or the text is JSON of messages, whatever their layout.
    """
    check_text(column, text)
    if _is_json_of_messages(text):
        raise RowProblem(
            column,
            "is messages written as text; store it as a list of objects with 'role' and 'content' "
            "(JSON lines, parquet)",
        )
    return text


def check_messages(column: str, messages: list[Any]) -> list[Message]:
    """Messages with role and text, without keys that are null (tables fill up with those).

    Raises:
        RowProblem: no message, or one that cannot go through a chat template.
    """
    if not messages:
        raise RowProblem(column, "is an empty list of messages")
    if len(messages) * _NODE_COST > MAX_ROW_CHARACTERS:
        raise RowProblem(column, f"is a list of {len(messages):,} messages; split the row")
    return [_check_message(column, message) for message in messages]


def check_tools(column: str, tools: Any) -> list[Any] | None:
    """The tools as a list, read from text if they are JSON; None if there are none.

    Raises:
        RowProblem: neither a list nor JSON of one.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(check_text(column, tools))
        except (ValueError, RecursionError):
            raise RowProblem(column, "is text but no JSON; give a list of tools") from None
    if tools is None or tools == "" or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list):
        raise RowProblem(column, f"must be a list of tools, found {kind_of(tools)}")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise RowProblem(column, f"must hold objects, found {kind_of(tool)} in the list")
    return _without_nulls(column, tools) or None


def check_size(column_values: Mapping[str, Any]) -> None:
    """Refuse a row that is too large for the tokenizer to be worth its time.

    Args:
        column_values: checked values by the names of their columns.

    Raises:
        RowProblem: together they are over `MAX_ROW_CHARACTERS`; names the largest column.
    """
    sizes = {column: _size(value) for column, value in column_values.items()}
    if sum(sizes.values()) > MAX_ROW_CHARACTERS:
        largest = max(sizes, key=lambda column: sizes[column])
        raise RowProblem(largest, _too_large(sizes[largest]))


def _too_large(characters: int) -> str:
    return f"is too large: {characters:,} characters; a row may have {MAX_ROW_CHARACTERS:,} in all"


def _check_message(column: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        if isinstance(message, Mapping) and {"from", "value"} <= set(message):
            raise RowProblem(
                column,
                "holds messages with 'from' and 'value'; rename them to 'role' and 'content'",
            )
        raise RowProblem(column, "must hold messages with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise RowProblem(
            column, f"has a message with role {shown(role)}; known: {', '.join(ROLES)}"
        )
    if content is None and message.get("tool_calls"):
        content = ""  # a message that only calls a tool has no text
    if not isinstance(content, str):
        raise RowProblem(column, f"has a message whose content is {kind_of(content)}, not text")
    rest = {
        str(key): _without_nulls(column, value)
        for key, value in message.items()
        if value is not None and key not in ("role", "content")
    }
    return {"role": role, "content": check_text(column, content), **rest}


def _without_nulls(column: str, value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise RowProblem(column, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {
            str(key): _without_nulls(column, item, depth + 1)
            for key, item in value.items()
            if item is not None
        }
    value = plain(value)
    if isinstance(value, list):
        return [_without_nulls(column, item, depth + 1) for item in value]
    return check_text(column, value) if isinstance(value, str) else value


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_NODE_COST + len(str(key)) + _size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(_NODE_COST + _size(item) for item in value)
    return _NODE_COST


def _is_json_of_messages(text: str) -> bool:
    text = text.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    messages = value if isinstance(value, list) else [value]
    return any(
        isinstance(message, dict)
        and ({"role", "content"} <= set(message) or {"from", "value"} <= set(message))
        for message in messages
    )


def _is_message_list_as_text(text: str) -> bool:
    text = text.strip()
    if not (text.startswith("[{") and text.endswith("}]")):
        return False
    beginning = text[:60]
    return any(
        f"{quote}{key}{quote}" in beginning for quote in "'\"" for key in ("role", "content")
    )
