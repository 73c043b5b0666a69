"""Fitting one YAML value to the declared type of its key, or saying in one line why not.

Conversions lose nothing: 3 is a float, 3.0 an int; "yes" in quotes is no boolean.
"""

import enum
import types
import typing
from typing import Any

from ..errors import ConfigError
from .options import SECRET_KEYS

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def coerce(key: str, value: Any, hint: Any, where: str) -> Any:
    """Return `value` as one of the types `hint` allows.

    Args:
        key: the key, for the message.
        value: as read from YAML.
        hint: the field's resolved type hint.
        where: where it was written, for the message.

    Returns:
        The value, converted where nothing is lost.

    Raises:
        ConfigError: none of the types fits.
    """
    members = _members(hint)
    if Any in members:
        return value
    for member in members:
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return _choice(key, value, member, where)
    for member in members:
        kind = typing.get_origin(member) or member
        if kind is typing.Literal:
            if value in typing.get_args(member):
                return value
        elif isinstance(kind, type) and _is_exactly(value, kind):
            _check_items(key, value, member, where)
            return value
    if float in members and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if int in members and isinstance(value, float) and value.is_integer():
        return int(value)
    expected = " or ".join(dict.fromkeys(_describe(m) for m in members if _describe(m)))
    raise ConfigError(f"{where}: {key} must be {expected}, found {_shown(key, value)}")


def _choice(key: str, value: Any, choices: type[enum.Enum], where: str) -> str:
    # An unquoted `no` is the boolean False in YAML 1.1, and also what people mean by "no".
    text = "no" if value is False else value
    allowed = [str(item.value) for item in choices]
    if text not in allowed:
        raise ConfigError(
            f"{where}: {key} must be one of {', '.join(allowed)}; found {_shown(key, value)}"
        )
    return str(text)


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _is_exactly(value: Any, kind: type) -> bool:
    # bool is a subclass of int, but `seed: true` is a mistake.
    return type(value) is kind


def _check_items(key: str, value: Any, member: Any, where: str) -> None:
    arguments = typing.get_args(member)
    if isinstance(value, list) and arguments and arguments[0] is str:
        for item in value:
            if not isinstance(item, str):
                raise ConfigError(
                    f"{where}: {key} must be a list of text, found {_shown(key, item)} in it"
                )


def _shown(key: str, value: Any) -> str:
    if key in SECRET_KEYS:
        return f"a {type(value).__name__} (not shown)"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _describe(member: Any) -> str:
    if typing.get_origin(member) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(member))
    return _NAMES.get(typing.get_origin(member) or member, "")
