"""Which columns of a row are the prompt, the completions, the system message and the tools.

A column is found by its usual name (the tables below), or by the user's `column_mapping`. What is
not plain is refused, with the mapping that would settle it: two prompts that differ, a name in
other capitals, text beside the prompt that would be left out.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from ...errors import RowProblem
from ..files.column_mapping import CONTEXT_COLUMNS, MappedRow
from ..preference_row import Message
from .row_values import (
    MAX_DEPTH,
    check_column_text,
    check_messages,
    check_size,
    check_text,
    check_tools,
    kind_of,
    plain,
    shown,
)
from .transcripts import is_transcript

COMPLETION_COLUMNS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TOOLS_COLUMN = "tools"

NO_ACCIDENT = 20
"""Characters of a text that do not stand in another one by accident."""

_PART_OF_NAME = {
    **{better: "chosen" for better, _ in COMPLETION_COLUMNS},
    **{worse: "rejected" for _, worse in COMPLETION_COLUMNS},
    **{name: "prompt" for name in PROMPT_COLUMNS},
    **{name: "system" for name in SYSTEM_COLUMNS},
    TOOLS_COLUMN: "tools",
}

Value = str | list[Message]


@dataclass
class RowParts:
    """The checked values of a row, by what they are; prompts may be none, one or several."""

    chosen: Value
    rejected: Value
    prompts: dict[str, Value] = field(default_factory=dict)
    """Prompt columns that hold something; an empty text only if no other does."""
    system: str = ""
    tools: list[Any] | None = None
    speaks_in_turns: bool = False
    """Whether there is a system or tools column, empty in this row or not: the rows of a file
    that has one are all messages, rather than some of them."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the parts' columns in the file, for messages."""

    def column(self, part: str) -> str:
        """Name in the file of a part's column."""
        return self.columns.get(part, part)

    @property
    def prompt(self) -> Value | None:
        """The only prompt, None if there is none.

        Raises:
            RowProblem: two columns could be the prompt, and differ.
        """
        if not self.prompts:
            return None
        (first, value), *others = self.prompts.items()
        for name, other in others:
            if _stripped(other) != _stripped(value):
                raise RowProblem(
                    name,
                    f"and column {first!r} could both be the prompt, and differ; join them, or "
                    f"set column_mapping: {{prompt: {first}}}",
                )
        return value

    @property
    def has_no_prompt(self) -> bool:
        """Whether no prompt column holds anything but white space."""
        return not any(value if isinstance(value, list) else value.strip()
                       for value in self.prompts.values())  # fmt: skip


def read_parts(row: Any) -> RowParts:
    """Find the columns of a row and check what they hold.

    Args:
        row: a mapping as read from a file or data set.

    Raises:
        RowProblem: a column is missing, in doubt, or holds what cannot be used.
    """
    if not isinstance(row, Mapping):
        raise RowProblem("prompt", f"cannot be found: the row is {kind_of(row)}, not an object")
    mapping: Mapping[str, str | None] = row.mapping if isinstance(row, MappedRow) else {}
    names = {part: str(column) for part, column in mapping.items() if column is not None}
    row = _with_plain_values(row)
    _refuse_near_misses(row, mapping)
    values: dict[str, Any] = {}
    for part, column in zip(("chosen", "rejected"), _completion_columns(row, mapping), strict=True):
        names.setdefault(part, column)
        values[part] = _completion(row, column, names[part])
    if isinstance(values["chosen"], str) != isinstance(values["rejected"], str):
        raise RowProblem(
            names["rejected"], f"must be of the same kind as column {names['chosen']!r}"
        )
    parts = RowParts(
        _checked(names["chosen"], values["chosen"]),
        _checked(names["rejected"], values["rejected"]),
        columns=names,
    )
    parts.prompts = _prompts(row, mapping, names)
    if "prompt" not in mapping:
        _refuse_context(row, parts)
    if parts.prompts:
        names.setdefault("prompt", next(iter(parts.prompts)))
    parts.system = _system(row, mapping, names)
    parts.tools = _tools(row, mapping, names)
    parts.speaks_in_turns = any(
        column in row
        for part, columns in (("system", SYSTEM_COLUMNS), ("tools", (TOOLS_COLUMN,)))
        for column in columns
        if mapping.get(part, column) is not None
    )
    check_size({
        names["chosen"]: parts.chosen, names["rejected"]: parts.rejected,
        **parts.prompts, names.get("system", "system"): parts.system,
        names.get("tools", TOOLS_COLUMN): parts.tools or [],
    })  # fmt: skip
    return parts


def _with_plain_values(row: Mapping[Any, Any]) -> Mapping[Any, Any]:
    values = {name: plain(value) for name, value in row.items()}
    if all(values[name] is value for name, value in row.items()):
        return row
    if not isinstance(row, MappedRow):
        return values
    changed = copy(row)
    changed.update(values)
    return changed


def _tell_all(parts: RowParts) -> bool:
    """Whether both completions are conversations from their beginning, so that nothing is lost."""
    return all(
        is_transcript(value) if isinstance(value, str) else value[0]["role"] != "assistant"
        for value in (parts.chosen, parts.rejected)
    )


def _refuse_context(row: Mapping[Any, Any], parts: RowParts) -> None:
    names = [name for name in CONTEXT_COLUMNS if not _is_blank(row.get(name))]
    if not names:
        return
    prompts = _texts_in(list(parts.prompts.values()))
    answers = _texts_in([parts.chosen, parts.rejected])
    tells_all = _tell_all(parts)
    for name in names:
        # Where it came from: its last answer may be one that was neither chosen nor rejected.
        if tells_all and name in ("conversation", "conversations"):
            continue
        told = prompts | answers if tells_all or name == "messages" else prompts
        if all(_is_told(text, told) for text in _texts_in(row.get(name))):
            continue
        # Beside a prompt it is more of it; without one, it may be the prompt itself.
        main = next(iter(parts.prompts), name)
        whole = f"say which column the whole prompt is: column_mapping: {{prompt: {main}}}, or "
        raise RowProblem(
            name,
            f"would be left out; put it into the prompt, {'' if tells_all else whole}"
            f"leave it out by column_mapping: {{{name}: null}}",
        )


def _texts_in(value: Any, depth: int = 0) -> set[str]:
    """What is said in a value, however nested: its texts, squeezed, without roles."""
    if isinstance(value, str):
        text = " ".join(value.split())
        return {text} if text else set()
    if isinstance(value, Mapping):
        said = [value[key] for key in ("content", "value") if key in value]
        values = said if said and {"role", "from"} & set(value) else list(value.values())
    else:
        values = list(value) if isinstance(value, (list, tuple)) else []
    if depth > MAX_DEPTH:
        return {""} if values else set()
    return {text for item in values for text in _texts_in(item, depth + 1)}


def _is_told(text: str, told: set[str]) -> bool:
    return text in told or (len(text) >= NO_ACCIDENT and any(text in other for other in told))


def _refuse_near_misses(row: Mapping[Any, Any], mapping: Mapping[str, Any]) -> None:
    found: dict[str, str] = {}
    for name, value in row.items():
        plain = "_".join(str(name).replace("-", " ").split()).lower()
        part = _PART_OF_NAME.get(plain)
        if part and plain != name and part not in mapping and not _is_blank(value):
            found.setdefault(part, str(name))
    for part, name in found.items():
        if part in row:
            raise RowProblem(
                part,
                f"and column {shown(name)} could both be meant; say which: "
                f"column_mapping: {{{part}: {part}}}",
            )
    if found:
        part = "chosen" if "chosen" in found else next(iter(found))
        suggestion = ", ".join(
            f"{part}: {name if name.isidentifier() else shown(name)}"
            for part, name in found.items()
        )
        raise RowProblem(
            part,
            f"is missing; rename column {shown(found[part])}, or set column_mapping: "
            f"{{{suggestion}}}",
        )


def _completion_columns(row: Mapping[Any, Any], mapping: Mapping[str, Any]) -> tuple[str, str]:
    if "chosen" in mapping or "rejected" in mapping:
        return COMPLETION_COLUMNS[0]
    return next((pair for pair in COMPLETION_COLUMNS if pair[0] in row), COMPLETION_COLUMNS[0])


def _completion(row: Mapping[Any, Any], column: str, name: str) -> Any:
    if column not in row:
        raise RowProblem(name, _missing(row, column, name))
    value = row[column]
    if value is None:
        raise RowProblem(name, "is null")
    if not isinstance(value, (str, list)):
        raise RowProblem(name, f"must be text or a list of messages, found {kind_of(value)}")
    return value


def _missing(row: Mapping[Any, Any], part: str, name: str) -> str:
    found = row.found if isinstance(row, MappedRow) else [str(column) for column in row]
    columns = ", ".join(shown(column) for column in found[:8]) + (", ..." if found[8:] else "")
    where = " (column_mapping names it)" if isinstance(row, MappedRow) and name != part else ""
    advice = "" if where else "; set column_mapping if another column is meant"
    return f"is missing{where}; columns found: {columns or 'none'}{advice}"


def _prompts(
    row: Mapping[Any, Any], mapping: Mapping[str, Any], names: dict[str, str]
) -> dict[str, Value]:
    if "prompt" in mapping:
        if mapping["prompt"] is None:
            return {}
        name = names["prompt"]
        if row.get("prompt") is None:
            problem = "is null" if "prompt" in row else _missing(row, "prompt", name)
            raise RowProblem(name, problem)
        return {name: _checked_prompt(name, row["prompt"])}
    found = {
        name: _checked_prompt(name, row[name])
        for name in PROMPT_COLUMNS
        if row.get(name) is not None
    }
    filled = {name: value for name, value in found.items() if _stripped(value)}
    return filled or dict([*found.items()][:1])


def _system(row: Mapping[Any, Any], mapping: Mapping[str, Any], names: dict[str, str]) -> str:
    if mapping.get("system", "") is None:
        return ""
    columns: Sequence[str] = ("system",) if "system" in mapping else SYSTEM_COLUMNS
    found: dict[str, str] = {}
    for column in columns:
        name = names.get("system", column)
        value = row.get(column)
        if value is None and "system" in mapping and column not in row:
            raise RowProblem(name, _missing(row, "system", name))
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise RowProblem(name, f"must be text, found {kind_of(value)}")
        if value.strip():
            found[name] = check_text(name, value)
    if not found:
        return ""
    (first, system), *others = found.items()
    for name, other in others:
        if other.strip() != system.strip():
            raise RowProblem(
                name,
                f"and column {first!r} could both be the system message, and differ; join them, or "
                f"set column_mapping: {{system: {first}}}",
            )
    names["system"] = first
    return system


def _tools(
    row: Mapping[Any, Any], mapping: Mapping[str, Any], names: dict[str, str]
) -> list[Any] | None:
    name = names.get("tools", TOOLS_COLUMN)
    if mapping.get("tools", "") is None:
        return None
    if "tools" in mapping and TOOLS_COLUMN not in row:
        raise RowProblem(name, _missing(row, "tools", name))
    return check_tools(name, row.get(TOOLS_COLUMN))


def _checked(column: str, value: Any) -> Value:
    if isinstance(value, str):
        if not value.strip():
            raise RowProblem(column, "is empty or white space only")
        return check_column_text(column, value)
    messages = check_messages(column, value)
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise RowProblem(column, "is empty or white space only")
    return messages


def _checked_prompt(column: str, value: Any) -> Value:
    if isinstance(value, str):
        return check_column_text(column, value)
    if isinstance(value, list):
        return check_messages(column, value)
    raise RowProblem(column, f"must be text or a list of messages, found {kind_of(value)}")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and not value)


def _stripped(value: Value | None) -> Any:
    return value.strip() if isinstance(value, str) else value
