"""A console that outlives its reader: what cannot be shown is no reason to end a training.

`lite-orpo train config.yaml | tee log` and a Ctrl-C, which ends tee first; a terminal that is
closed; a log on a full disk. rich's own console ends the process there, before the checkpoint.
"""

import contextlib
import errno
import os
import sys
from typing import Any

from rich.console import Console


class LastingConsole(Console):
    """Prints as rich's Console does, and goes on without a word where nobody reads it."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(file=_LastingOutput(), quiet=quiet)  # type: ignore[arg-type]


class _LastingOutput:
    """Whatever `sys.stdout` is at the time, without its OSErrors."""

    def write(self, text: str) -> int:
        with _unread():
            if sys.stdout is not None:
                sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with _unread():
            if sys.stdout is not None:
                sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


@contextlib.contextmanager
def _unread() -> Any:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            # For good: what is left in the buffer would fail again when the process ends, and
            # print() as well.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
