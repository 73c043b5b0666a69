"""How long a chat template may run and how much memory it may take for one rendering.

A template is a program from the hub. transformers runs it in Jinja's sandbox, which bounds what
it may touch and a single `range`, but neither nested loops nor `"x" * 10**10`. Bounded here:
processor time, on systems with POSIX timers and in the main thread; memory, on Linux. Not
bounded: time on Windows and in other threads, memory on macOS and Windows.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

MAX_SECONDS = 5.0
MAX_BYTES = 512 * 2**20


class RanTooLong(Exception):
    """Raised inside the template when its time is over."""


def within_limits(render: Callable[[], str]) -> str:
    """Call `render` with a limit of processor time and memory.

    Args:
        render: what runs the template.

    Returns:
        What it returns.

    Raises:
        RanTooLong: it took more than `MAX_SECONDS` of processor time.
        MemoryError: it wanted more than `MAX_BYTES`.
    """
    return _within_time(lambda: _within_memory(render))


# Functions and no context managers: a timer may ring at any call, and leaving a `with` is one.
def _within_time(render: Callable[[], str]) -> str:
    if not hasattr(signal, "SIGPROF") or threading.current_thread() is not threading.main_thread():
        return render()
    is_armed = True

    def stop(signum: int, frame: FrameType | None) -> None:
        if is_armed:
            raise RanTooLong

    handler = signal.signal(signal.SIGPROF, stop)
    # Processor time: a laptop that slept, or a busy one, is no looping template. Again and again,
    # for an exception that is raised inside a destructor gets lost.
    timer = signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, 0.1)
    try:
        return render()
    finally:
        is_armed = False
        signal.setitimer(signal.ITIMER_PROF, *timer)
        # None: the handler was not set from Python and cannot be put back from here.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if handler is None else handler)


def _within_memory(render: Callable[[], str]) -> str:
    used = _address_space()
    if used is None:
        return render()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = used + MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        room = min(room, soft)
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    try:
        return render()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of address space in use, where the system tells (Linux)."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None
