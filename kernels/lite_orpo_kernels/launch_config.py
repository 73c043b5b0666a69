"""Block sizes of the Triton kernels per class of GPU, and where each was measured.

One fixed configuration for each class and precision, chosen so that every kernel keeps within
the class's shared memory and spills no register where rows are aligned (tests compile all of
them for all classes without the cards; a hidden size that is no multiple of 16 is right and
slow); `autotune.py` looks for a better one on the card at hand, when asked.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch


class LogitsTile(NamedTuple):
    """One tile of logits: BLOCK_T rows by BLOCK_V columns, BLOCK_D of the hidden size a time."""

    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int


class RowsTile(NamedTuple):
    """One tile of e @ W: BLOCK_T rows by BLOCK_D of the hidden size, BLOCK_C columns a time."""

    block_t: int
    block_d: int
    block_c: int
    warps: int
    stages: int


class LaunchConfig(NamedTuple):
    """How the kernels of the head are launched for one class of GPU and one precision."""

    logits: LogitsTile
    rows: RowsTile
    measured: str | None
    """Where the configuration was measured to be good; None: compiled and checked only."""


class GpuClass(NamedTuple):
    """GPUs that share their configurations and their limits."""

    name: str
    shared_memory: int | None
    """Bytes a block of threads may use; None where the compiler is left to say."""
    half: LaunchConfig
    """For bf16 and fp16 inputs."""
    full: LaunchConfig
    """For fp32 inputs: three tf32 products for each, so that no digit is lost."""
    slim: LogitsTile | None = None
    """For bf16 and fp16 where more is kept for each logit (a soft-cap's derivative, a gradient),
    if that needs a smaller tile."""


NOT_MEASURED = None
KIB = 1024

# mma.sync keeps both operands in registers: 128 x 128 fp32 accumulators over 256 threads leave
# room for the epilogue without a spill, 4 warps or 256 columns do not.
_HALF = LaunchConfig(LogitsTile(128, 128, 64, 8, 3), RowsTile(128, 128, 64, 8, 3), NOT_MEASURED)
_HALF_SLIM = LaunchConfig(
    LogitsTile(128, 128, 32, 8, 3), RowsTile(128, 128, 32, 8, 3), NOT_MEASURED
)
_FULL = LaunchConfig(LogitsTile(64, 128, 32, 8, 2), RowsTile(64, 128, 32, 8, 2), NOT_MEASURED)
_SAFE_HALF = LaunchConfig(LogitsTile(64, 64, 32, 4, 2), RowsTile(64, 64, 32, 4, 2), NOT_MEASURED)

# Another number for each logit beside wgmma's or tcgen05's accumulators spills at 128 x 128.
_SLIM = LogitsTile(64, 128, 64, 8, 3)

GPU_CLASSES = {
    "sm_80": GpuClass("sm_80", 163 * KIB, _HALF, _FULL),
    "sm_86/89": GpuClass("sm_86/89", 99 * KIB, _HALF_SLIM, _FULL),
    "sm_90": GpuClass("sm_90", 227 * KIB, _HALF, _FULL, _SLIM),
    "sm_100": GpuClass("sm_100", 227 * KIB, _HALF, _FULL, _SLIM),
    "sm_120": GpuClass("sm_120", 99 * KIB, _HALF, _FULL._replace(rows=RowsTile(64, 64, 32, 8, 2))),
    # ROCm, XPU, and NVIDIA cards newer than this file.
    "default": GpuClass("default", None, _SAFE_HALF, _SAFE_HALF),
}


def gpu_class(device: torch.device | str) -> GpuClass:
    """The class of a device; "default" where this file does not know it."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        return GPU_CLASSES["default"]
    return GPU_CLASSES[class_name(*torch.cuda.get_device_capability(device))]


def class_name(major: int, minor: int) -> str:
    """Name of the class of an NVIDIA compute capability of 8.0 or newer."""
    names = {
        (8, 0): "sm_80",
        (8, 6): "sm_86/89",
        (8, 7): "sm_86/89",
        (8, 9): "sm_86/89",
        (9, 0): "sm_90",
    }
    by_major = {10: "sm_100", 12: "sm_120"}
    return names.get((major, minor), by_major.get(major, "default"))


_overrides: dict[tuple[str, bool], LaunchConfig] = {}


def launch_config(
    device: torch.device | str, dtype: torch.dtype, *, slim: bool = False
) -> LaunchConfig:
    """Configuration for tensors on `device`: the one set by `override`, or the fixed one.

    `slim` is for kernels that keep more than a logit: what is fast without may spill with it, so
    their tile of logits is the class's own in any case.
    """
    found = gpu_class(device)
    is_half = dtype != torch.float32
    config = _overrides.get((found.name, is_half), found.half if is_half else found.full)
    if is_half and slim and found.slim is not None:
        config = config._replace(logits=found.slim)
    return config


def override(device: torch.device | str, dtype: torch.dtype, config: LaunchConfig | None) -> None:
    """Use `config` from now on for this class of device and precision; None: the fixed one.

    Raises:
        ValueError: BLOCK_C does not divide BLOCK_V, so a step would cross two blocks.
    """
    found = gpu_class(device)
    key = (found.name, dtype != torch.float32)
    if config is None:
        _overrides.pop(key, None)
        return
    for tile in (config.logits, *([found.slim] if found.slim is not None else [])):
        if tile.block_v % config.rows.block_c:
            raise ValueError(
                f"rows.block_c={config.rows.block_c} must divide logits.block_v={tile.block_v}"
            )
    _overrides[key] = config


def overridden(device: torch.device | str, dtype: torch.dtype) -> LaunchConfig | None:
    """Return the configuration that `override` has set, if any."""
    return _overrides.get((gpu_class(device).name, dtype != torch.float32))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one: Triton launches there, whatever its tensors' device is."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()
