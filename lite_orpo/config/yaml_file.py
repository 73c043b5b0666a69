"""Reading and writing a flat YAML configuration, with the line of every key for error messages.

What the keys mean is decided elsewhere. Loaded with PyYAML's safe loader, plus two repairs:
`1e-4` is a number (YAML 1.1 reads it as text), and a key given twice is an error. A value that
grows beyond all measure through its aliases ("billion laughs") is refused before it is built.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import ConfigError


class Setting(NamedTuple):
    """A value and where it was written, such as "config.yaml line 3"."""

    value: Any
    where: str


MAX_NODES = 10_000  # of one file or value, each alias counted as often as it stands there


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Parse one value as YAML would, for overrides on the command line.

    Raises:
        ConfigError: the text is no YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bombs(node)
        return loader.construct_document(node)
    except _UNREADABLE as error:
        shown = repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
        raise ConfigError(f"cannot read the value {shown}: {_one_line(error)}") from None
    finally:
        loader.dispose()


def read_settings(path: Path) -> dict[str, Setting]:
    """Read a YAML mapping of flat keys.

    Args:
        path: the file, UTF-8.

    Returns:
        Each key's value and where it stands.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; `lite-orpo init {path}` writes a commented one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines at the top level")
        _refuse_bombs(node)
        settings: dict[str, Setting] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            where = f"{path} line {key_node.start_mark.line + 1}"
            if key in settings:
                raise ConfigError(f"{where}: {key} is set twice, first at {settings[key].where}")
            settings[key] = Setting(loader.construct_object(value_node, deep=True), where)
        return settings
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    finally:
        loader.dispose()


def write_settings(path: Path, settings: dict[str, Any], comment: str = "") -> None:
    """Write settings as YAML in the given order, under lines of comment."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)
    # Beside it and renamed: a full disk must not cost what was there.
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(head + text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


# A date that is none and a number of thousands of digits are ValueErrors.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


def _refuse_bombs(node: yaml.Node) -> None:
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = None
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, children))
        known = sizes[id(node)]
        if known is None:
            raise yaml.MarkedYAMLError(problem="a value contains itself")
        return known

    if size(node) > MAX_NODES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values, aliases counted")


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem
