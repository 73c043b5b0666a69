"""One process at a time writes into a run's folder: two would delete each other's checkpoints.

A lock of the system's, which ends with its process however that dies. Where a file system has no
locks, nothing is refused. Of several ranks the first one holds it.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError

LOCK_FILE = ".lite-orpo.lock"
# Not flock: its locks live on in a killed process's own children, such as workers that load data.
if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK)}
_held: dict[Path, int] = {}


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder; again inside of it is allowed.

    Args:
        folder: an output folder; made if it is not there.

    Raises:
        CheckpointError: another process is training into it.
    """
    key = folder.resolve()
    descriptor = None if key in _held else _locked(folder)
    if descriptor is None:
        yield
        return
    _held[key] = descriptor
    try:
        yield
    finally:
        del _held[key]
        # While it is locked, or the next one's would be deleted; Windows deletes no open file.
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # whoever writes there next says why that cannot be
        try:
            _lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE)):
                return descriptor
        except FileNotFoundError:
            pass  # deleted by whom it was waited for, as is another file of that name
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _TAKEN:
                return None
            raise CheckpointError(
                f"output_dir: {folder} is being trained into by another process; wait for it or "
                "end it, or name another folder"
            ) from None
        os.close(descriptor)
