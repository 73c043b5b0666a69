"""How every benchmark here measures: fresh processes, interleaved rounds, medians, provenance.

The process that a user starts never imports torch. On Linux a child inherits its parent's peak
memory across fork and exec, so a heavy parent would put a floor under every figure.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("lite_orpo", "kernels", "benchmarks")
PACKAGES = ("lite-orpo", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
RESULT_MARK = "RESULT "


def run_benchmark(
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: argparse.ArgumentParser,
) -> None:
    """Run a script: as a worker if it was started as one, else measure and report.

    Args:
        measure: makes the figures by `run_worker` and prints its table.
        work: what one worker process does with its specification.
        arguments: the script's own options.
    """
    if sys.argv[1:2] == ["--worker"]:
        print(RESULT_MARK + json.dumps(work(json.loads(sys.argv[2]))), flush=True)
        return
    arguments.add_argument("--json", type=Path, help="write figures and provenance to this file")
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options = arguments.parse_args()
    code_before = _commit()
    figures = measure(options)
    if options.json is not None:
        source = {**provenance(options.threads), "code_before": code_before}
        document = {"provenance": source, **figures}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def run_worker(script: str, specification: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run `script` in a fresh process on one specification and return what it measured.

    Raises:
        RuntimeError: the worker failed; the message ends with its own.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, script, "--worker", json.dumps(specification)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_MARK)]
    if done.returncode != 0 or not results:
        raise RuntimeError(f"worker {specification} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(results[-1][len(RESULT_MARK) :]))


def peak_mib() -> float:
    """Most memory this process has had resident so far (ru_maxrss), in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def resident_mib() -> float | None:
    """Memory resident now, in MiB; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize() / 2**20


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, aligned so that it also reads in a terminal."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def note(text: str) -> None:
    """Say on stderr what is running."""
    print(text, file=sys.stderr, flush=True)


def provenance(threads: int) -> dict[str, Any]:
    """Where figures come from: versions, CPU, threads, commit. No host name, no paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *_arguments_without_paths()]),
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_end": list(os.getloadavg()),
        **_commit(),
    }


def _arguments_without_paths() -> list[str]:
    return [Path(argument).name for argument in sys.argv[1:]]


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    named = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    known = flags.group(1).split() if flags else []
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known]
    return f"{named.group(1) if named else platform.machine()} ({', '.join(wide)})"


def _commit() -> dict[str, Any]:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = [folder for folder in MEASURED if git("status", "--porcelain", "--", folder)]
    except OSError:
        return {"commit": "unknown"}
    return {"commit": commit or "unknown", "uncommitted_changes_in": changed}
