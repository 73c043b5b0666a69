"""What a disk may hold after the power went: less than the process was told it wrote.

Made from the calls of a followed fork (`syscall_deaths.py`). What was written to a file that was
not synced since may be there in part or not at all; a new name or a new folder may be undone until
the folder that it is in was synced.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from syscall_deaths import OPENS, RENAMES, SYNCS, WRITES, Call


class Unsynced:
    """What of a fork's calls was not yet safe from a loss of power when it ended.

    Args:
        calls: those that were made.
        folder: as the fork left it.
    """

    def __init__(self, calls: list[Call], folder: Path) -> None:
        self._calls = calls
        written: set[int] = set()
        self.names: list[int] = []
        """Which of the calls gave a name that may be undone; oldest first."""
        for index, call in enumerate(calls):
            if call.kind in SYNCS:
                written.discard(call.inode)
                self.names = [one for one in self.names if self._folder_of(one, index) != call.path]
            elif call.kind in RENAMES or (call.inode is None and call.kind in {*OPENS, "mkdir"}):
                self.names.append(index)
            elif call.inode is not None and call.kind in {*OPENS, *WRITES}:
                written.add(call.inode)
        files = (path for path in folder.rglob("*") if path.is_file())
        self.files = [
            path.relative_to(folder).as_posix() for path in files if path.stat().st_ino in written
        ]
        """Whose contents may be lost."""

    def ways_to_lose(self) -> dict[str, Callable[[Path], None]]:
        """Functions that change a copy of the folder to what may be left of it."""
        ways: dict[str, Callable[[Path], None]] = {"the process alone": lambda copy: None}
        if self.files:
            ways["half of the files"] = partial(self._cut, 0.5)
            ways["the files"] = partial(self._cut, 0)
        if self.names:
            ways["the last name"] = partial(self._undo, 1)
            ways["the names"] = partial(self._undo, len(self.names))
        return ways

    def _cut(self, share: float, copy: Path) -> None:
        for name in self.files:
            os.truncate(copy / name, int((copy / name).stat().st_size * share))

    def _undo(self, count: int, copy: Path) -> None:
        for index in reversed(self.names[-count:]):
            call = self._calls[index]
            path = copy / self._later(call.target or call.path, index)
            if not path.exists():
                continue  # removed since
            if call.target is not None:
                path.rename(copy / self._later(call.path, index))
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _folder_of(self, index: int, now: int) -> str:
        """In which folder the name is that a call gave, just before another call."""
        name = self._calls[index].target or self._calls[index].path
        for call in self._calls[index + 1 : now]:
            name = _moved(name, call)
        return os.path.dirname(name) or "."

    def _later(self, name: str, index: int) -> str:
        """Where something is whose name a call gave, its folder being renamed for good since."""
        for later in range(index + 1, len(self._calls)):
            if later not in self.names:
                name = _moved(name, self._calls[later])
        return name


def _moved(name: str, call: Call) -> str:
    is_inside = call.kind in RENAMES and name.startswith(f"{call.path}/")
    return f"{call.target}{name.removeprefix(call.path)}" if is_inside else name
