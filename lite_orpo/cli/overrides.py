"""Settings given on the command line: `key=value`, `--key value`, `--key=value`, `--flag`."""

from pathlib import Path

from ..config.options import SECRET_KEYS
from ..config.yaml_file import Setting, parse_value
from ..errors import ConfigError

WHERE = "command line"
# What --resume stands for.
RESUME = {"resume_from_checkpoint": Setting(True, f"{WHERE} (--resume)")}


NO_CONFIGURATION = (
    "no configuration file; `lite-orpo init` writes one, then `lite-orpo train config.yaml`"
)


def split_arguments(
    arguments: list[str],
    config: Path | None,
    *,
    what: str = "the configuration",
    missing: str = NO_CONFIGURATION,
) -> tuple[Path, dict[str, Setting]]:
    """Tell the configuration file, or whatever a command is about, from the overrides.

    Args:
        arguments: everything after the command's name.
        config: the file, where it was given as an option.
        what: the name of what is no override, for messages.
        missing: the message where there is none.

    Returns:
        The file and the overrides. Hyphens in keys count as underscores.

    Raises:
        ConfigError: no file or two, an option without a value, or a key given twice.
    """
    overrides: dict[str, Setting] = {}
    paths = [] if config is None else [config]
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
            paths.append(Path(word))
            continue
        key = key.strip().replace("-", "_")
        if not key:
            raise ConfigError(f"{WHERE}: {word!r} has no key; write key=value")
        if key in overrides:
            raise ConfigError(f"{WHERE}: {key} is given twice")
        overrides[key] = Setting(_read(key, text), WHERE)
    if not paths:
        raise ConfigError(f"{WHERE}: {missing}")
    if len(paths) > 1:
        raise ConfigError(
            f"{WHERE}: {str(paths[1])!r} is neither key=value nor {what} ({paths[0]} is)"
        )
    return paths[0], overrides


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
