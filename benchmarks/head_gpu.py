"""The fused head alone on a GPU, bf16, forward and backward with a frozen head, against its peers.

`make bench-gpu`, or `python benchmarks/head_gpu.py [--quick] [--tune] [--json PATH]`. Needs torch
and Triton; peers take part where they can be imported. Every figure stands beside one bare
`torch.mm(h, W.T)` of the same round. How it is measured:

- Time: CUDA events around a call, median of 20 calls; methods take turns in 3 rounds, and the table
  holds the median of the rounds with the least and the most. A method of more than 2 s a round is
  called less often (the column says how often). "host ms" is the time until a call returned with
  the device idle before: where it is close to the time, launches (or a wait inside) are what is
  measured. The L2 cache is left as it is.
- Memory: most that torch had allocated during a call over what it had before, after a first call.
  It includes the log-probabilities and the gradient of hidden [rows, D], which everybody makes.
- Error: of the gradient of hidden and of the log-probabilities, on up to 512 rows, against fp64. A
  method that fails, leaves no gradient, or is wrong by more than 5 % is named with the reason and
  has no time.
- Inputs: `peaked_activations.py`; the output says whether they are a model's or synthetic.

With `--device cpu --shapes tiny` and TRITON_INTERPRET=1 the same code runs on a CPU by the wall
clock, so that what goes wrong goes wrong there first; its figures mean nothing.

Predicted before the first run on a GPU, for an H200, as multiples of the bare product:
- lite-orpo, forward and backward: 2.2 to 2.6; the floor is 2.0 (two products).
- our chunked PyTorch: 2.6 to 3.2; eager: 3.5 to 5.
- extra memory of lite-orpo: 64 MiB + 2 [rows, D] of bf16 (the direction and the gradient).
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from protocol import ROOT, note, provenance

# A machine that only measures has nothing installed.
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
from gpu_contest import MIB, Effort, contest, print_lines  # noqa: E402
from gpu_peers import BARE_PRODUCT, Method, head_methods, loss_methods, orpo_loss_of, ours  # noqa: E402
from peaked_activations import (  # noqa: E402
    Activations,
    Exact,
    describe,
    described,
    exact_logprobs,
    from_file,
    synthetic,
)

from lite_orpo_kernels.chunk_plan import plan_chunks  # noqa: E402
from lite_orpo_kernels.head import Head, HeadTransform  # noqa: E402
from lite_orpo_kernels.launch_config import (  # noqa: E402
    LaunchConfig,
    LogitsTile,
    RowsTile,
    launch_config,
    override,
)

SHAPES = {
    "qwen2.5-0.5b": (896, 151_936),
    "llama3.2-1b": (2048, 128_256),
    "llama3.1-8b": (4096, 128_256),
    "gemma2-2b": (2304, 256_000),
}
TINY = {"tiny": (64, 150)}
ROWS, TINY_ROWS = (1024, 4096, 8192), (8, 16)
WORKSPACES = {"qwen2.5-0.5b": 4096, "llama3.1-8b": 8192, "activations": 4096, "tiny": 16}
LOSS_ROWS = {"llama3.2-1b": 4096, "activations": 4096, "tiny": 16}
PAIRS = 4
TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (64, 128, 64, 4, 3),
    (64, 256, 32, 8, 3),
)
WORKSPACE_MIB, SMALL_MIB = 64, 4
PEER_PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")


class Plan(NamedTuple):
    """What is run."""

    shapes: dict[str, tuple[int, int]]
    rows: tuple[int, ...]
    effort: Effort
    device: torch.device
    activations: Path | None
    candidates: int
    deadline: float

    def inputs(self, name: str, rows: int) -> Activations:
        """Activations of a model, as many as there are, or synthetic ones."""
        if self.activations is not None:
            return from_file(self.activations, self.device).first(rows)
        return synthetic(rows, *self.shapes[name], self.device)


def measure_heads(plan: Plan, name: str) -> dict[str, Any]:
    """All heads at one shape and every number of rows."""
    methods, left_out = head_methods()
    everything, results = plan.inputs(name, max(plan.rows)), {}
    for rows in plan.rows:
        if rows > len(everything.hidden) or time.monotonic() > plan.deadline:
            note(f"{name}, {rows} rows: left out, too few activations or out of time")
            continue
        inputs = everything.first(rows)
        exact = exact_logprobs(inputs)
        assert exact.miss is not None
        peaks = describe(exact.miss)
        lines = contest(methods, inputs, exact, plan.effort)
        width, vocabulary = inputs.weight.shape[1], len(inputs.weight)
        print_lines(f"{name}: D={width}, V={vocabulary:,}, {rows} rows, bf16", lines)
        print(f"Inputs: {inputs.label}\n{described(peaks)}")
        for peer, reason in left_out.items():
            print(f"Left out: {peer}: {reason}")
        memory = memory_check(lines["triton"], rows, width)
        print(memory, flush=True)
        results[str(rows)] = {
            "shape": [rows, width, vocabulary],
            "inputs": inputs.label,
            "peaks": peaks,
            "methods": lines,
            "left_out": left_out,
            "memory_check": memory,
        }
    return results


def memory_check(line: dict[str, Any], rows: int, width: int) -> str:
    """Compare what the fused head allocated with what it promises."""
    one = rows * width * 2 / MIB
    bound = WORKSPACE_MIB + 2 * one + SMALL_MIB
    promise = f"{WORKSPACE_MIB} MiB + 2 x [rows, D] of {one:.1f} MiB + {SMALL_MIB} MiB"
    if line.get("extra_mib") is None:
        return f"Memory: not measured (promised: {promise})"
    left = bound - line["extra_mib"]
    verdict = f"pass, {left:.1f} MiB below" if left >= 0 else f"FAIL, {-left:.1f} MiB above"
    return f"Memory: {verdict} {promise}"


def measure_workspaces(plan: Plan, name: str) -> dict[str, Any]:
    """The same head with more and less room: how its products are cut, and what that costs."""
    inputs = plan.inputs(name, WORKSPACES[name])
    head = Head(inputs.weight, None, None, HeadTransform(1.0, None))
    config = launch_config(plan.device, torch.bfloat16)
    methods = [BARE_PRODUCT]
    for mib in (32, 64, 128, 256):
        cut = plan_chunks(len(inputs.hidden), head, config, mib * MIB, keeps_weights=True)
        title = f"{mib} MiB: {cut.rows} rows x {cut.columns} columns"
        methods.append(Method(f"{mib}", title, ours("triton", workspace_bytes=mib * MIB)))
    lines = contest(methods, inputs, exact_logprobs(inputs), plan.effort)
    print_lines(f"Workspace, {name}: {len(inputs.hidden)} rows", lines)
    return lines


def measure_losses(plan: Plan, name: str) -> dict[str, Any]:
    """The whole ORPO loss against Liger's, on completions of equal length."""
    inputs = plan.inputs(name, LOSS_ROWS[name])
    inputs = inputs.first(len(inputs.hidden) // (2 * PAIRS) * 2 * PAIRS)
    hidden = inputs.hidden.double().requires_grad_()
    loss = orpo_loss_of(PAIRS, "chunked")(hidden, inputs.weight.double(), inputs.targets)
    loss.backward()
    assert hidden.grad is not None
    every_row = torch.arange(len(hidden), device=hidden.device)
    exact = Exact(every_row, loss.detach(), hidden.grad)
    del hidden, loss
    methods, left_out = loss_methods(PAIRS)
    lines = contest(methods, inputs, exact, plan.effort)
    print_lines(f"Whole ORPO loss, {name}: {PAIRS} pairs, {len(inputs.hidden)} rows", lines)
    for peer, reason in left_out.items():
        print(f"Left out: {peer}: {reason}", flush=True)
    return {"methods": lines, "left_out": left_out}


def tune(plan: Plan, name: str) -> dict[str, Any]:
    """Try tiles for the first product, then for the second beside the best of the first.

    A pass without gradients makes the first product alone: its lines tell the two apart.
    """
    inputs = plan.inputs(name, plan.rows[-1])
    exact = exact_logprobs(inputs)
    best = launch_config(plan.device, torch.bfloat16)
    results = {}
    tiles = TILES[: plan.candidates]
    for stage in ("logits", "rows"):
        tried = {"as it is": best}
        for tile in tiles:
            # A tile of rows has the same five numbers, with columns of the chunk for BLOCK_D.
            other = best._replace(logits=LogitsTile(*tile))
            if stage == "rows":
                other = best._replace(rows=RowsTile(*tile))
            tried[str(tile)] = other
        methods = [BARE_PRODUCT, *(_under(label, config) for label, config in tried.items())]
        if stage == "logits":
            methods += [_under(label, config, alone=True) for label, config in tried.items()]
        lines = contest(methods, inputs, exact, plan.effort)
        print_lines(f"Tiles of {stage}, {name}: {len(inputs.hidden)} rows, from {best[:2]}", lines)
        times = {label: lines[label]["ms"]["median"] for label in tried if "ms" in lines[label]}
        fastest = min(times, key=times.__getitem__, default="as it is")
        best = tried[fastest]
        print(f"Fastest: {fastest}: {best[:2]}", flush=True)
        results[stage] = {"tried": {n: list(c) for n, c in tried.items()}, "methods": lines}
    return results


def _under(label: str, config: LaunchConfig, *, alone: bool = False) -> Method:
    """Our head under one configuration; with a frozen head the forward pass launches everything."""
    fused = ours("triton")

    def head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        override(hidden.device, hidden.dtype, config)
        try:
            return fused(hidden, weight, targets)
        finally:
            override(hidden.device, hidden.dtype, None)

    if alone:
        return Method(f"{label}, no_grad", f"{label}, no_grad", head, wants_gradient=False)
    return Method(label, label, head)


def where_from(plan: Plan, commit: str | None) -> dict[str, Any]:
    """What `protocol.provenance` says, and the GPU, its driver, its libraries and the date."""
    found = provenance(torch.get_num_threads())
    for package in PEER_PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    if found["commit"] == "unknown" and commit is not None:
        found["commit"] = f"{commit}, as the caller says"
    digest = sha256()
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(file.read_bytes())
    found["kernels_sha256"] = digest.hexdigest()[:16]
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found["torch_cuda"] = torch.version.cuda
    found["device"] = plan.device.type
    if plan.device.type == "cuda":
        asked = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.sm"
        command = ["nvidia-smi", asked, "--format=csv"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:  # the driver works without its tool
            said = ""
        found["device"] = torch.cuda.get_device_name()
        found["nvidia_smi"] = said.strip().splitlines()
        found["memory_mib"] = torch.cuda.mem_get_info()[1] / MIB
    return found


def planned(options: argparse.Namespace) -> Plan:
    """Turn options into what is run."""
    is_tiny = options.shapes == ["tiny"]
    every = {**SHAPES, **TINY}
    shapes = {name: every[name] for name in options.shapes}
    if options.activations is not None:
        shapes = {"activations": (0, 0)}
    rows: tuple[int, ...] = TINY_ROWS if is_tiny else ROWS
    if options.quick:
        rows = rows[1:2]
    effort = Effort(1, 7) if options.quick else Effort(3, 20)
    if is_tiny or options.device == "cpu":
        effort = Effort(2, 2, warm_up=0)
    return Plan(
        shapes,
        tuple(options.rows or rows),
        effort,
        torch.device(options.device),
        options.activations,
        options.candidates,
        time.monotonic() + 60 * options.minutes,
    )


def main(options: argparse.Namespace) -> None:
    """Measure, print, and write what there is after every part."""
    plan = planned(options)
    document: dict[str, Any] = {"benchmark": "head_gpu", "rounds": plan.effort.rounds}
    document |= {"calls": plan.effort.calls, "results": {}}
    document["provenance"] = where_from(plan, options.commit)
    parts = [("tiles", tune, list(plan.shapes))]
    if not options.tune:
        parts = [
            ("heads", measure_heads, list(plan.shapes)),
            ("workspaces", measure_workspaces, [n for n in plan.shapes if n in WORKSPACES]),
            ("losses", measure_losses, [n for n in plan.shapes if n in LOSS_ROWS]),
        ]
    for part, measure, names in parts:
        for name in names:
            if time.monotonic() > plan.deadline:
                note(f"{part}, {name}: left out, {options.minutes:g} minutes are over")
                continue
            note(f"{part}, {name}")
            document["results"].setdefault(part, {})[name] = measure(plan, name)
            document["provenance"] = where_from(plan, options.commit)
            if options.json is not None:
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["provenance"], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write figures and provenance to this file")
    parser.add_argument("--quick", action="store_true", help="4096 rows, one round of 7 calls")
    parser.add_argument("--tune", action="store_true", help="try tiles instead")
    parser.add_argument("--candidates", type=int, default=len(TILES), help="of --tune, the first N")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *TINY], default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1024 4096 8192")
    parser.add_argument("--activations", type=Path, help="of a model: see peaked_activations.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing new is begun after")
    parser.add_argument("--commit", help="of the code, where there is no git")
    main(parser.parse_args())
