"""A folder that appears under its name complete, or not at all, whenever the process dies."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .manifest import write_manifest


def staging_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.parent / f".{final.name}.partial"


def replaced_folder(final: Path) -> Path:
    """Where an older folder of the same name is while the new one takes its place."""
    return final.parent / f".{final.name}.replaced"


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Write a folder beside its place; at the end it is synced and renamed.

    The order that makes it safe: files, manifest, fsync of each and of the folder, rename, fsync
    of the parent. What a process leaves that dies before the rename is not taken for a
    checkpoint, and is removed by the next that stages the same folder.

    Args:
        final: the folder's place; one that is there is replaced at the end.

    Yields:
        The folder to write into.
    """
    partial, replaced = staging_folder(final), replaced_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        write_manifest(partial)
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what processes left that died while they wrote a checkpoint."""
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":
        if path.is_dir():
            return  # there is no handle for it
        with path.open("r+b") as stream:
            os.fsync(stream.fileno())
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; their files are synced.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
