"""Execute the notebooks on the shipped model and keep what they show: `make notebooks`.

The .ipynb files are the source; only their outputs are replaced. The kernel is this interpreter,
so that no kernel need be registered, and nothing is fetched.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

HERE = Path(__file__).parent
# Bars that have moved, and what bitsandbytes says on CPUs for which it has a faster kernel.
_NOISE = re.compile(r"\d+%\||\d+ examples \[|^Failed to load CPU gemm_4bit_forward ")


class OwnInterpreter(AsyncKernelManager):
    """Starts kernels with the Python that runs this script."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How a kernel is started."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def kernel_environment(folder: Path) -> dict[str, str]:
    """Variables of a kernel that fetches nothing and writes its settings into `folder`."""
    commands = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([commands, os.environ.get("PATH", "")]),
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        # tqdm's, where ipywidgets are not installed: its bars are not kept anyway.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }


def execute(
    notebook: Any, folder: Path, environment: dict[str, str], timeout: int = 600
) -> dict[str, Any]:
    """Run all cells of a notebook, in place.

    Args:
        notebook: from `nbformat.read`.
        folder: where the kernel starts; a folder above it has `examples/demo_model`.
        environment: variables of the kernel.
        timeout: seconds that a cell may take.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has the traceback.
    """
    client = NotebookClient(
        notebook,
        kernel_manager_class=OwnInterpreter,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _is_noise(output: Any) -> bool:
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return all(_NOISE.search(line) for line in re.split(r"[\r\n]+", output.text) if line.strip())


def main() -> None:
    """Execute the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in this folder")
    for path in parser.parse_args().notebooks or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, HERE, kernel_environment(Path(folder)))
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main()
