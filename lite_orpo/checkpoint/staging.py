"""A folder that appears under its name complete, or not at all, whenever the process dies."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .manifest import why_incomplete, write_manifest


def staging_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.parent / f".{final.name}.partial"


def replaced_folder(final: Path) -> Path:
    """Where an older folder of the same name is while the new one takes its place."""
    return final.parent / f".{final.name}.replaced"


@contextlib.contextmanager
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
            sync(path)
        sync(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        sync(final.parent)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(output_dir: Path) -> None:
    """Give a folder its name again whose replacement was cut off between two renames."""
    for path, final in _replaced_ones(output_dir):
        if not final.exists():
            with contextlib.suppress(OSError):  # another rank was faster
                path.rename(final)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what processes left that died while they wrote a checkpoint."""
    put_back(output_dir)
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path, final in _replaced_ones(output_dir):
        # Once its successor is set aside or rotated away, it would be put back.
        if why_incomplete(final) is None:
            shutil.rmtree(path, ignore_errors=True)


def _replaced_ones(output_dir: Path) -> list[tuple[Path, Path]]:
    found = [
        (path, output_dir / path.name[1 : -len(".replaced")])
        for path in output_dir.glob(".checkpoint-*.replaced")
    ]
    return [(path, final) for path, final in found if replaced_folder(final) == path]


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to where they outlive it."""
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
