"""One run of a comparison: `lite-orpo train` in a process of its own, so that its peak is its own.

A run that has ended is not made again; one that was stopped goes on from its checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.find import newest_complete
from ..errors import ConfigError

_STEP = re.compile(r"step (\d+)/(\d+): (.*)")
_ERROR = "lite-orpo: error: "
_LOOK_EVERY = 0.3  # seconds


class Cost(NamedTuple):
    """What a run took."""

    seconds: float
    """Of training, and of scoring the reference where the loss has one."""
    peak_mib: float | None
    tokens_per_second: float | None


class RunOutcome(NamedTuple):
    """How a run ended."""

    problem: str | None = None
    """Why it has no result; None: it has."""
    was_stopped: bool = False


class Run(NamedTuple):
    """A run to make, or to go on with."""

    folder: Path
    """Of what is trained. What this module notes of it lies beside it."""
    config: Path
    settings: dict[str, Any]
    """All overrides, also those that are the same in other runs."""
    data: str = ""
    """What the pairs are, in short (`digest_of_files`)."""

    def digest(self) -> str:
        """Of configuration, overrides and data: two alike are the same run."""
        settings = {key: value for key, value in self.settings.items() if key != "output_dir"}
        written = json.dumps(settings, sort_keys=True).encode()
        parts = (self.config.read_bytes(), written, self.data.encode())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    @property
    def log_file(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def state_file(self) -> Path:
        """What the folder is for, and whether the run has ended."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def is_finished(self) -> bool:
        """Whether it has been made.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        state = _read_state(self.state_file)
        if state is None:
            return False
        if state.get("digest") != self.digest():
            raise ConfigError(
                f"{self.folder} holds a run with other settings or other pairs; give --output "
                "another folder"
            )
        return bool(state.get("finished"))

    def begin(self) -> None:
        """Note what the folder is for."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._note(finished=False)

    def finish(self) -> None:
        """Note that it is done."""
        self._note(finished=True)

    def _note(self, *, finished: bool) -> None:
        state = {"digest": self.digest(), "finished": finished}
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps(state) + "\n", encoding="utf-8")
        os.replace(partial, self.state_file)

    def command(self) -> list[str]:
        """The command line of its training."""
        words = [f"{key}={_argument(value)}" for key, value in self.settings.items()]
        command = [sys.executable, "-m", "lite_orpo.cli.main", "train", str(self.config), *words]
        if newest_complete(self.folder).checkpoint is not None:
            return [*command, "--resume"]
        return [*command, "overwrite_output_dir=true"]


def digest_of_files(names: Iterable[str | None]) -> str:
    """Of the contents of those that are files here; of hub names and folders nothing is read."""
    digest = hashlib.sha256()
    for name in names:
        path = Path(name or "").expanduser()
        if path.is_file():
            with contextlib.suppress(OSError), path.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()


_PEAK, _SPEED = "lite_orpo/peak_memory_mib", "lite_orpo/tokens_per_second"
_REFERENCE = "lite_orpo/reference_seconds"


def cost_of(lines: list[dict[str, Any]]) -> Cost:
    """What a run took, from its log lines.

    Of a run that was stopped and gone on with, the time of all its parts; one that was killed has
    left no figure of the part that it lost.
    """
    parts = [line for line in lines if "train_runtime" in line]
    peaks = [line[_PEAK] for line in lines if _PEAK in line]
    speeds = [line[_SPEED] for line in lines if _SPEED in line]
    # The reference is kept: each part tells the same time again.
    reference = max((float(line.get(_REFERENCE, 0.0)) for line in parts), default=0.0)
    seconds = sum(float(line["train_runtime"]) for line in parts) + reference
    return Cost(seconds, max(peaks, default=None), sum(speeds) / len(speeds) if speeds else None)


def make(run: Run, on_step: Callable[[int, int, str], None]) -> RunOutcome:
    """Make a run, or go on with it.

    Args:
        run: not finished yet.
        on_step: told of each log line: step, steps, figures.

    Returns:
        How it ended. A signal to this process stops the run with a checkpoint.
    """
    command = run.command()
    run.begin()
    with run.log_file.open("ab") as log:
        start = log.tell()
        # In a session of its own: a Ctrl-C reaches it once, through this process.
        child = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(), start_new_session=True
        )
        with _handing_on(child) as was_asked:
            for text in _lines(run.log_file, start, child):
                step = _STEP.search(text)
                if step is not None:
                    on_step(int(step.group(1)), int(step.group(2)), step.group(3))
    if child.returncode == 0:
        run.finish()
        return RunOutcome()
    if was_asked or child.returncode in (130, 143):
        return RunOutcome("stopped", was_stopped=True)
    return RunOutcome(_problem(run.log_file, start, child.returncode))


def _environment() -> dict[str, str]:
    # A log is no terminal, whatever the parent's variables say.
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return {**kept, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def _handing_on(child: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the run, which then saves; yields those that came."""
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        if child.poll() is None:
            child.send_signal(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            before[number] = signal.signal(number, hand_on)
    try:
        yield came
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(path: Path, start: int, child: "subprocess.Popen[bytes]") -> Iterator[str]:
    """What the run prints, as it prints it."""
    rest = b""
    with path.open("rb") as stream:
        stream.seek(start)
        while True:
            has_ended = child.poll() is not None
            *lines, rest = (rest + stream.read()).split(b"\n")
            for line in lines:
                yield line.decode("utf-8", errors="replace")
            if has_ended:
                return
            time.sleep(_LOOK_EVERY)


def _problem(path: Path, start: int, code: int) -> str:
    with path.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith(_ERROR):
            return line.removeprefix(_ERROR)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; see {path}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{last or f'exit code {code}'}; see {path}"


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return state if isinstance(state, dict) else {}


def _argument(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
