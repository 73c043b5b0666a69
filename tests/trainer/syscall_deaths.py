"""A fork that is followed by its system calls and killed at the k-th that changes a folder.

Python's audit hooks see neither writes nor what Rust opens (safetensors, tokenizers); the kernel
sees all of it. The child puts a seccomp filter on itself that stops it at calls that change files,
and at no other: following costs next to nothing. The parent (ptrace) looks at each stop whether
the call touches the folder, and kills the child before the call is made. Linux on x86-64 and
aarch64; `why_not()` says what is missing elsewhere.
"""

import ctypes
import errno
import os
import platform
import random
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Numbers of the calls on x86-64 and on aarch64 (None: it has no such call).
_NUMBERS: dict[str, tuple[int | None, int]] = {
    "openat": (257, 56),
    "openat2": (437, 437),
    "write": (1, 64),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "pwritev": (296, 70),
    "pwritev2": (328, 287),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "ftruncate": (77, 46),
    "truncate": (76, 45),
    "fallocate": (285, 47),
    "mmap": (9, 222),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
}
# Of x86-64 alone: the older calls without a folder's descriptor.
_OLDER = {"open": 2, "creat": 85, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# For each call: its first argument of each kind; a path has the descriptor of its folder before.
_BY_DESCRIPTOR = {
    "write": 0, "pwrite64": 0, "writev": 0, "pwritev": 0, "pwritev2": 0, "ftruncate": 0,
    "fallocate": 0, "fsync": 0, "fdatasync": 0, "sendfile": 0, "copy_file_range": 2, "mmap": 4,
}  # fmt: skip
_BY_PATH = {
    "open": 0, "creat": 0, "rename": 0, "mkdir": 0, "rmdir": 0, "unlink": 0, "truncate": 0,
}  # fmt: skip
_BY_FOLDER_AND_PATH = {
    "openat": 0, "openat2": 0, "renameat": 0, "renameat2": 0, "mkdirat": 0, "unlinkat": 0,
    "linkat": 0, "symlinkat": 1,
}  # fmt: skip
SYNCS = {"fsync", "fdatasync"}
RENAMES = {"rename", "renameat", "renameat2"}
OPENS = {"open", "openat", "openat2", "creat"}
REMOVALS = {"unlink", "unlinkat", "rmdir"}
WRITES = (set(_BY_DESCRIPTOR) | {"truncate"}) - SYNCS
_AT_REMOVEDIR = 0x200

_TRACEME, _CONT, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_EVENT_SECCOMP = 7
# Threads and children are followed too; all die with the tracer.
_OPTIONS = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 7) | (1 << 20)
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Call(NamedTuple):
    """A system call that touches the folder, before it is made."""

    kind: str
    path: str
    """Relative to the folder."""
    target: str | None = None
    """Of a rename, relative to the folder."""
    inode: int | None = None
    """Of the file that the path names now; None if there is none."""


@dataclass
class Followed:
    """What a fork did to the folder before it ended."""

    calls: list[Call] = field(default_factory=list)
    """Those that were made."""
    exit_code: int | None = None
    """None where it was killed."""
    killed_before: Call | None = None


def follow(work: Callable[[], Any], folder: Path, die_at: int | None = None) -> Followed:
    """Run `work` in a fork; kill it at its `die_at`-th call (from 1) that changes the folder."""
    random_state = random.getstate()  # Python seeds it anew in every fork
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            _ptrace(_TRACEME, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            random.setstate(random_state)
            _install_filter()
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.waitpid(pid, _WALL)  # it has stopped itself
    _ptrace(_SETOPTIONS, pid, 0, _OPTIONS)
    _ptrace(_CONT, pid, 0, 0)
    return _watch(pid, str(folder), die_at)


def _watch(pid: int, folder: str, die_at: int | None) -> Followed:
    found = Followed()
    while True:
        thread, status = os.waitpid(-pid, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                code = os.waitstatus_to_exitcode(status)
                found.exit_code = None if found.killed_before is not None else code
                return found
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP and found.killed_before is None:
            call = _call(thread, folder)
            if call is not None and len(found.calls) + 1 == die_at:
                found.killed_before = call
                os.kill(pid, signal.SIGKILL)
                continue
            if call is not None:
                found.calls.append(call)
        is_ours = event != 0 or number in (signal.SIGTRAP, signal.SIGSTOP)
        _ptrace(_CONT, thread, 0, 0 if is_ours else number, may_be_gone=True)


def _call(pid: int, folder: str) -> Call | None:
    buffer = ctypes.create_string_buffer(88)
    if _ptrace(_GET_SYSCALL_INFO, pid, 88, ctypes.addressof(buffer), may_be_gone=True) < 0:
        return None
    number, *arguments = struct.unpack_from("<7Q", buffer.raw, 24)
    kind = _kinds()[number]
    target = None
    if kind in _BY_DESCRIPTOR:
        path = _of_descriptor(pid, arguments[_BY_DESCRIPTOR[kind]])
    elif kind in _BY_PATH:
        path = _of_path(pid, None, arguments[0])
    else:
        at = _BY_FOLDER_AND_PATH[kind]
        path = _of_path(pid, arguments[at], arguments[at + 1])
    if kind in RENAMES:
        target = (
            _of_path(pid, None, arguments[1])
            if kind == "rename"
            else _of_path(pid, arguments[2], arguments[3])
        )
    if kind in OPENS and not _can_change(pid, kind, arguments):
        return None
    if path != folder and not path.startswith(folder + "/"):
        return None
    if kind == "unlinkat" and arguments[2] & _AT_REMOVEDIR:
        kind = "rmdir"
    try:
        inode = os.stat(path).st_ino
    except FileNotFoundError:
        inode = None
    inside = os.path.relpath(path, folder)
    return Call(kind, inside, target and os.path.relpath(target, folder), inode)


def _can_change(pid: int, kind: str, arguments: list[int]) -> bool:
    if kind == "creat":
        return True
    flags = arguments[1] if kind == "open" else arguments[2]
    if kind == "openat2":
        (flags,) = struct.unpack("<Q", _memory(pid, flags, 8))
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _of_descriptor(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}")
    except OSError:
        return ""


def _of_path(pid: int, descriptor: int | None, address: int) -> str:
    path = os.fsdecode(_memory(pid, address, 4096).split(b"\0")[0])
    if os.path.isabs(path):
        return os.path.normpath(path)
    number = None if descriptor is None else descriptor & 0xFFFFFFFF
    is_here = number is None or number == 0x100000000 - 100  # AT_FDCWD
    start = os.readlink(f"/proc/{pid}/cwd") if is_here else _of_descriptor(pid, number)
    return os.path.normpath(os.path.join(start, path))


def _memory(pid: int, address: int, size: int) -> bytes:
    # Up to the end of its page first: the next one may not be there.
    first = min(size, 4096 - address % 4096)
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        data = os.pread(descriptor, first, address)
        if b"\0" not in data and first < size:
            data += os.pread(descriptor, size - first, address + first)
        return data
    finally:
        os.close(descriptor)


def _kinds() -> dict[int, str]:
    column, _ = _MACHINES[platform.machine()]
    found = {pair[column]: name for name, pair in _NUMBERS.items()}
    if column == 0:
        found |= {number: name for name, number in _OLDER.items()}
    return found


def _ptrace(request: int, pid: int, address: int, data: int, *, may_be_gone: bool = False) -> int:
    _libc.ptrace.restype = ctypes.c_long
    _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    result = _libc.ptrace(request, pid, address, data)
    if result < 0 and not (may_be_gone and ctypes.get_errno() == errno.ESRCH):
        raise OSError(
            ctypes.get_errno(), f"ptrace({request:#x}): {os.strerror(ctypes.get_errno())}"
        )
    return result


def _install_filter() -> None:
    """Have the calls of `_kinds` stop at the tracer, of mmap only what others would see."""
    _, machine = _MACHINES[platform.machine()]
    load, jump_equal, jump_bits, give = 0x20, 0x15, 0x45, 0x06
    allow, trace = 0x7FFF0000, 0x7FF00000
    numbers = sorted(_kinds())
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, machine), (give, 0, 0, allow), (load, 0, 0, 0)]
    for number in numbers:
        if _kinds()[number] == "mmap":
            # MAP_SHARED (1) or MAP_SHARED_VALIDATE (3), the fourth argument's lowest bit
            program += [(jump_equal, 0, 4, number), (load, 0, 0, 16 + 3 * 8)]
            program += [(jump_bits, 0, 1, 1), (give, 0, 0, trace), (give, 0, 0, allow)]
        else:
            program += [(jump_equal, 0, 1, number), (give, 0, 0, trace)]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    )
    no_new_privileges, set_seccomp, with_filter = 38, 22, 2
    _libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if _libc.prctl(no_new_privileges, 1, 0, 0, 0) or _libc.prctl(
        set_seccomp, with_filter, ctypes.addressof(header), 0, 0
    ):
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def why_not() -> str | None:
    """Why a fork cannot be followed here; None where it can, which is tried."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return "follows system calls by ptrace and seccomp: Linux on x86-64 or aarch64"
    import subprocess

    script = (
        "import sys, tempfile; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from syscall_deaths import follow\n"
        "folder = Path(tempfile.mkdtemp()); found = follow((folder / 'a').touch, folder)\n"
        "(folder / 'a').unlink(); folder.rmdir()\n"
        "sys.exit(not (found.exit_code == 0 and len(found.calls) == 1))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "ptrace or seccomp does not work here: it hangs"
    if done.returncode == 0:
        return None
    return f"ptrace or seccomp is forbidden here: {done.stderr.strip().splitlines()[-1:]}"
