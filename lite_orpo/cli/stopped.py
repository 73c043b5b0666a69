"""A run that was stopped before its end: after how long, and the command that goes on with it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
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


def command_to_go_on(
    path: Path, overrides: dict[str, Setting], environment: Mapping[str, str] | None = None
) -> str | None:
    """The command line that goes on with a run, without a token: terminals get copied.

    Args:
        path: the configuration.
        overrides: what was given on the command line.
        environment: variables that a launcher of several processes has set; default: none has.

    Returns:
        The command; None where the launcher is not known, or there are several machines.
    """
    program = _program(environment or {})
    if program is None:
        return None
    left_out = {*RESUME, *SECRET_KEYS}
    kept = {k: s.value for k, s in overrides.items() if k not in left_out}
    words = [f"{key}={_text(value)}" for key, value in kept.items()]
    words = [*program, "train", str(path), *words, "--resume"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _program(environment: Mapping[str, str]) -> list[str] | None:
    processes = environment.get("WORLD_SIZE", "1")
    if processes == "1":
        return _own_program(sys.argv[0])
    is_torchrun = "TORCHELASTIC_RUN_ID" in environment  # and so is what accelerate launches
    if not is_torchrun or environment.get("LOCAL_WORLD_SIZE") != processes:
        return None
    module = ["-m", "lite_orpo.cli.main"]
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return ["accelerate", "launch", "--num_processes", processes, *module]
    return ["torchrun", "--nproc_per_node", processes, *module]


def _own_program(called: str) -> list[str]:
    """How this process was called: `lite-orpo` where a shell finds that one by its name."""
    path = Path(called)
    if path.parts[-3:] == ("lite_orpo", "cli", "main.py"):
        return [sys.executable, "-m", "lite_orpo.cli.main"]
    on_path = shutil.which(path.name)
    is_found = on_path is not None and Path(on_path).resolve() == path.resolve()
    is_elsewhere = path.stem == "lite-orpo" and path.parent != Path() and not is_found
    return [called] if is_elsewhere else ["lite-orpo"]


_LAUNCHERS = ("torchrun ", "accelerate ")


class SoFar:
    """What a run has come to, for the line that a Ctrl-C outside of its steps ends with."""

    def __init__(self) -> None:
        self.text = "nothing has been trained yet."

    def trains_into(self, folder: Path) -> None:
        """From now on there may be checkpoints."""
        self.text = f"--resume goes on from the newest complete checkpoint in {folder}, if any."

    def is_saved(self, folder: Path) -> None:
        """What was trained is written."""
        self.text = (
            f"what was trained is in {folder}, complete; the last evaluation, answers or report "
            f"are missing. `lite-orpo eval {shlex.quote(str(folder))}` gives the figures."
        )


def print_stopped(
    console: Console, reason: str, step: int, steps: int, checkpoint: str, command: str | None
) -> None:
    """Say that a run is not at its end, what is saved, and how it goes on."""
    console.print(f"Stopped ({reason}) after step {step} of {steps}; {checkpoint} is complete.")
    if command is None:
        console.print("Start it again as you did, on all machines, with --resume added.")
        return
    if command.startswith(_LAUNCHERS):  # their other options are not known here
        console.print("Start it again as you did, with --resume added; without other options:")
    else:
        console.print("Go on with:")
    console.print(Text("    " + command), soft_wrap=True)


def _text(value: object) -> str:
    """A value as it is read back from a command line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    read = parse_value(text) if text else None
    is_same = type(read) is type(value) and read == value
    return text if is_same else json.dumps(value, default=str)
