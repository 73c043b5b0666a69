"""A file system of so many bytes: a tmpfs that is mounted in a fork, in a namespace of its own."""

import ctypes
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_REMOUNT, _PRIVATE, _RECURSIVE = 32, 1 << 18, 1 << 14


class NotPermitted(Exception):
    """Namespaces or mounts are not permitted here."""


def on_small_disk(folder: Path, size: int, work: Callable[[Callable[[int], None]], Any]) -> Any:
    """Run `work` in a fork in which the folder is an empty file system.

    A fork cannot train: threads of pyarrow's are gone in it. See `full_disk_runs.py` for that.

    Args:
        folder: an empty one.
        size: in bytes, rounded up to pages.
        work: is given a function that changes the size, as if space was freed.

    Returns:
        What `work` returns.

    Raises:
        NotPermitted: the system does not let this process do that.
        AssertionError: with the fork's traceback, if `work` fails.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        outcome: tuple[str, Any]
        try:
            mount(folder, size)
            outcome = ("done", work(lambda new: change_size(folder, new)))
        except NotPermitted as error:
            outcome = ("not permitted", str(error))
        except BaseException:
            outcome = ("failed", traceback.format_exc())
        with os.fdopen(writing, "wb") as stream:
            stream.write(pickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        kind, value = pickle.loads(stream.read())
    os.waitpid(pid, 0)
    if kind == "not permitted":
        raise NotPermitted(value)
    assert kind == "done", value
    return value


def mount(folder: Path, size: int) -> None:
    """Put an empty file system on a folder, for this process alone; it must have one thread."""
    if sys.platform != "linux":
        raise NotPermitted("tmpfs is Linux's")
    user, group = os.getuid(), os.getgid()
    if _call("unshare", _NEW_USER | _NEW_MOUNTS) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", user), ("gid_map", group)):
            line = text if name == "setgroups" else f"0 {text} 1"
            Path(f"/proc/self/{name}").write_text(line)
    elif _call("unshare", _NEW_MOUNTS) != 0:
        raise NotPermitted(f"unshare: {os.strerror(ctypes.get_errno())}")
    # What is mounted here must not be seen outside.
    _do_mount(None, "/", None, _PRIVATE | _RECURSIVE, None)
    _do_mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")


def change_size(folder: Path, size: int) -> None:
    """Change the size of what `mount` put there; not below what it holds."""
    _do_mount("tmpfs", str(folder), "tmpfs", _REMOUNT, f"size={size}")


def _do_mount(source: str | None, target: str, kind: str | None, flags: int, data: Any) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    if _call("mount", *words[:3], flags, words[3]) != 0:
        raise NotPermitted(f"mount: {os.strerror(ctypes.get_errno())}")


def _call(name: str, *arguments: Any) -> int:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    return function(
        *(
            ctypes.c_ulong(one) if isinstance(one, int) else ctypes.c_char_p(one)
            for one in arguments
        )
    )
