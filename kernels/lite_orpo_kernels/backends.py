"""Which backend runs on which device, and why: in words that `lite-orpo env` prints.

Triton needs matrix instructions to be worth its name. Where it has none for a device (CPUs, Apple
GPUs, NVIDIA cards before sm_80, AMD cards before matrix cores), or is not installed, the pure
PyTorch backend runs.
"""

import importlib.util
from typing import NamedTuple

import torch

from .launch_config import gpu_class

BACKENDS = ("auto", "triton", "chunked", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST_CAPABILITY = (8, 0)


class Backend(NamedTuple):
    """The backend that would run, and why."""

    name: str
    reason: str


def select_backend(
    device: torch.device | str, backend: str = "auto", dtype: torch.dtype | None = None
) -> Backend:
    """Resolve `backend` for tensors on `device`.

    Args:
        device: where the hidden states live.
        backend: "auto", or the name of a backend to insist on.
        dtype: of the hidden states, if it is known.

    Returns:
        The backend's name and the reason for it, in words for a user.

    Raises:
        ValueError: the name is unknown, or "triton" is asked for and cannot run there.
        ModuleNotFoundError: "triton" is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    if backend in ("chunked", "reference"):
        return Backend(backend, "asked for")
    if backend == "triton":
        _check_triton_runs(device, dtype)
        return Backend("triton", "asked for")
    obstacle = _obstacle(device, dtype)
    if obstacle is not None:
        return Backend("chunked", f"pure PyTorch in bounded memory; {obstacle}")
    found = gpu_class(device)
    measured = found.half.measured or "compiled and checked, not measured"
    return Backend("triton", f"Triton kernels; block sizes of class {found.name} ({measured})")


def triton_is_installed() -> bool:
    """Whether the `triton` package can be imported, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # an import hook that says so in its own way
        return False


def _check_triton_runs(device: torch.device, dtype: torch.dtype | None) -> None:
    if not triton_is_installed():
        raise ModuleNotFoundError(
            'backend="triton" needs the package triton, which is not installed: '
            '`pip install triton` (Linux), or use backend="chunked"',
            name="triton",
        )
    if device.type == "cpu":
        if not _kernels_are_interpreted():
            raise ValueError(
                'backend="triton" needs a GPU; on a CPU use backend="chunked", or set '
                "TRITON_INTERPRET=1 before Python starts to run the kernels in the interpreter"
            )
    elif device.type not in ("cuda", "xpu"):
        raise ValueError(f'Triton has no {device.type} target; use backend="chunked"')
    if dtype is not None and dtype not in TRITON_DTYPES:
        raise ValueError(
            f'backend="triton" takes bf16, fp16 and fp32, found {dtype}; use backend="chunked"'
        )


def _kernels_are_interpreted() -> bool:
    from .fused_logprobs import IS_INTERPRETED

    return IS_INTERPRETED


def _obstacle(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why Triton is not the choice for `device`, or None if it is."""
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no kernels for {device.type}"
    if not triton_is_installed():
        return "Triton is not installed"
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"the Triton kernels take no {dtype}"
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        if not getattr(properties, "has_subgroup_matrix_multiply_accumulate", False):
            return "this XPU has no matrix instructions"
        return None
    if torch.version.hip is not None:
        return _amd_obstacle(torch.cuda.get_device_properties(device).gcnArchName)
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        major, minor = capability
        return f"Triton has no matrix instructions for sm_{major}{minor}; they begin with sm_80"
    return None


def _amd_obstacle(architecture: str) -> str | None:
    # CDNA (gfx908, 90a, 942, 950) and RDNA 3 and 4 (gfx11, gfx12) have matrix instructions.
    name = architecture.split(":")[0]
    has_them = name in ("gfx908", "gfx90a") or name.startswith(("gfx94", "gfx95", "gfx11", "gfx12"))
    return None if has_them else f"{name} has no matrix instructions"
