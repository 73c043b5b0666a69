"""How much memory a device has left, and how much a run has taken of it at its highest."""

import contextlib
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take: of the GPU's memory, or of the system's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    import psutil

    available, left = int(psutil.virtual_memory().available), _left_to_container()
    return available if left is None else min(available, left)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that this process has held: of the GPU's memory as its allocator reserved them,
    or of the system's; None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return _own("VmHWM") if device.type == "cpu" else None


class PeakMemory:
    """The most memory held since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            # Linux lets a process begin its high-water mark anew. Elsewhere the mark is that of
            # its whole life, and getrusage's is even inherited from the process that started it.
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")
                self._before = _own("VmRSS")

    def beyond(self) -> int | None:
        """Bytes of a CPU's process beyond what it held at the beginning; None if not known."""
        peak = peak_bytes(self._device)
        return None if self._before is None or peak is None else max(peak - self._before, 0)

    def allocated(self) -> int | None:
        """Most bytes in use on a GPU at any moment; None elsewhere."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return None


def _own(name: str) -> int | None:
    """Bytes that the system says of this process; None where it says nothing (no Linux)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def _left_to_container() -> int | None:
    """Bytes that a container may still take; None where it has no limit of its own."""
    try:
        most = int((_CGROUP / "memory.max").read_text())
        return max(most - int((_CGROUP / "memory.current").read_text()), 0)
    except (OSError, ValueError):  # no such file, or "max"
        return None
