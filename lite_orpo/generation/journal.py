"""Answers as they are made, so that a run that was killed goes on where it was.

JSON lines beside the output: first what the run is made of, then an answer a line, synced batch by
batch. A line that was cut off by the kill is dropped; its answer is made again.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, ConfigError


class Entry(NamedTuple):
    """One answer."""

    number: int
    """Of the prompt in its file, from 0."""
    turn: int
    answer: str
    stamp: float
    """When, in seconds since 1970."""


class Journal:
    """The journal of one output file.

    Args:
        output: the file that the run is going to write.
        made_of: what must not differ when a run goes on; JSON values by name.

    Raises:
        ConfigError: there is a journal, of a run that is made of something else.
    """

    def __init__(self, output: Path, made_of: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.partial.jsonl")
        self._made_of = json.loads(json.dumps(made_of))
        self.found = self._read()

    def _read(self) -> list[Entry]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            entries = [Entry(**line) for line in lines]
            theirs = dict(head["made_of"])
        except (ValueError, TypeError, KeyError):
            if not whole:
                return []  # killed before its first line was whole
            raise ConfigError(
                f"{self.path} is no journal of answers; remove it, or name another output"
            ) from None
        names = {**theirs, **self._made_of}
        differs = [name for name in names if theirs.get(name) != self._made_of.get(name)]
        if differs:
            raise ConfigError(
                f"{self.path} is of a run that differs in {', '.join(differs)}; go on as it was "
                "begun, remove it, or name another output"
            )
        return entries

    def begin(self) -> None:
        """Write what the run is made of, and the answers that were found whole.

        Raises:
            CheckpointError: it cannot be written.
        """
        lines = [json.dumps({"made_of": self._made_of}), *map(_line, self.found)]
        partial = self.path.with_name(f".{self.path.name}.new")
        try:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def add(self, entries: Iterable[Entry]) -> None:
        """Append answers, and have them on the disk when this returns.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{_line(entry)}\n" for entry in entries))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def remove(self) -> None:
        """Once the output is written."""
        self.path.unlink(missing_ok=True)


def _line(entry: Entry) -> str:
    return json.dumps(entry._asdict())


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error.strerror}); what it holds is kept: the same command "
        "goes on from there"
    )
