"""A run that was stopped before its end: after how long, and the command that goes on with it."""

import json
import re
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..config.options import SECRET_KEYS
from ..config.yaml_file import Setting, parse_value
from ..errors import ConfigError
from .overrides import RESUME

_UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float:
    """Read a duration such as 45m, 1h30m or 90s.

    Raises:
        ConfigError: it is none, or zero.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ConfigError(
            f"--stop-after must be a duration such as 45m, 1h30m or 90s, found {text!r}"
        )
    return seconds


def command_to_go_on(path: Path, overrides: dict[str, Setting]) -> str:
    """The command line that goes on with a run, without a token: terminals get copied."""
    left_out = {*RESUME, *SECRET_KEYS}
    kept = {k: s.value for k, s in overrides.items() if k not in left_out}
    words = [f"{key}={_text(value)}" for key, value in kept.items()]
    return shlex.join(["lite-orpo", "train", str(path), *words, "--resume"])


def print_stopped(
    console: Console, reason: str, step: int, steps: int, checkpoint: str, command: str
) -> None:
    """Say that a run is not at its end, what is saved, and how it goes on."""
    console.print(f"Stopped ({reason}) after step {step} of {steps}; {checkpoint} is complete.")
    console.print("Go on with:")
    console.print(Text("    " + command), soft_wrap=True)


def _text(value: object) -> str:
    """A value as it is read back from a command line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    read = parse_value(text) if text else None
    is_same = type(read) is type(value) and read == value
    return text if is_same else json.dumps(value, default=str)
