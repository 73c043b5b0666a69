"""Settings given on the command line: `key=value`, `--key value`, `--key=value`, `--flag`."""

from pathlib import Path

from ..config.options import SECRET_KEYS
from ..config.yaml_file import Setting, parse_value
from ..errors import ConfigError

WHERE = "command line"
# What --resume stands for.
RESUME = {"resume_from_checkpoint": Setting(True, f"{WHERE} (--resume)")}


def split_arguments(arguments: list[str], config: Path | None) -> tuple[Path, dict[str, Setting]]:
    """Tell the configuration file from the overrides.

    Args:
        arguments: everything after the command's name.
        config: the file, where it was given as an option.

    Returns:
        The file and the overrides. Hyphens in keys count as underscores.

    Raises:
        ConfigError: no file or two, an option without a value, or a key given twice.
    """
    words, overrides = _split(arguments)
    paths = [*([] if config is None else [config]), *map(Path, words)]
    if not paths:
        raise ConfigError(
            f"{WHERE}: no configuration file; `lite-orpo init` writes one, then "
            "`lite-orpo train config.yaml`"
        )
    if len(paths) > 1:
        raise ConfigError(
            f"{WHERE}: {str(paths[1])!r} is neither key=value nor the configuration ({paths[0]} is)"
        )
    return paths[0], overrides


def split_words(
    arguments: list[str], names: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, Setting]]:
    """Tell what a command is about from the overrides.

    Args:
        arguments: everything after the command's name.
        names: what the words that are no override are called, in their order.

    Returns:
        As many words as names, and the overrides.

    Raises:
        ConfigError: too few or too many words, or as in `split_arguments`.
    """
    words, overrides = _split(arguments)
    if len(words) < len(names):
        missing = " and ".join(names[len(words) :])
        raise ConfigError(f"{WHERE}: {missing} not given; --help tells what it is")
    if len(words) > len(names):
        raise ConfigError(
            f"{WHERE}: {words[len(names)]!r} is neither key=value nor {' or '.join(names)}"
        )
    return tuple(words), overrides


def _split(arguments: list[str]) -> tuple[list[str], dict[str, Setting]]:
    overrides: dict[str, Setting] = {}
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, separator, text = word[2:].partition("=")
            if not separator:
                has_value = bool(rest) and not rest[0].startswith("--")
                text = rest.pop(0) if has_value else "true"
        elif "=" in word and not Path(word).is_file():
            key, _, text = word.partition("=")
        else:
            words.append(word)
            continue
        key = key.strip().replace("-", "_")
        if not key:
            raise ConfigError(f"{WHERE}: {word!r} has no key; write key=value")
        if key in overrides:
            raise ConfigError(f"{WHERE}: {key} is given twice")
        overrides[key] = Setting(_read(key, text), WHERE)
    return words, overrides


def _read(key: str, text: str) -> object:
    try:
        return parse_value(text)
    except ConfigError:
        if key not in SECRET_KEYS:
            raise
        raise ConfigError(f"{WHERE}: the value of {key} cannot be read (not shown)") from None


def refuse_twice(overrides: dict[str, Setting]) -> None:
    """Raise a ConfigError if --resume is given beside the key that it stands for."""
    for key in RESUME:
        if key in overrides:
            raise ConfigError(f"{WHERE}: --resume and {key} are both given; give one")
