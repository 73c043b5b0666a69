"""`lite-orpo env`: versions, devices, and the kernel backend that would run, with the reason."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from lite_orpo_kernels import select_backend

from ..config.orpo_config import gpu_has_bf16

PACKAGES = (
    "lite-orpo",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "trl",
    "safetensors",
)


def show_environment() -> None:
    """Print the tables; worth pasting into a bug report."""
    console = Console()
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("python", f"{platform.python_version()} on {platform.system()}")
    for package in PACKAGES:
        try:
            versions.add_row(package, version(package))
        except PackageNotFoundError:
            versions.add_row(package, "[yellow]not installed[/yellow]")
    console.print(versions)
    devices = Table(
        "device", "what it is", "compute dtype", "backend", title="Devices", title_justify="left"
    )
    for device, description, dtype in _devices():
        backend = select_backend(device)
        devices.add_row(device, description, dtype, f"{backend.name}: {backend.reason}")
    console.print(devices)


def _devices() -> list[tuple[str, str, str]]:
    cores = os.cpu_count() or 1
    found = [("cpu", f"{cores} cores, {torch.get_num_threads()} torch threads", "float32")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        description = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
        with torch.cuda.device(index):
            found.append((f"cuda:{index}", description, _half_dtype()))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU", "float32"))
    return found


def _half_dtype() -> str:
    return "bfloat16" if gpu_has_bf16() else "float16"
