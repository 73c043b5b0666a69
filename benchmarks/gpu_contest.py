"""How methods take turns on one device: who is right, how long each takes, what it allocates.

A method is called once for its error against fp64, and has a time only if it is right. This file
knows nothing of the shapes and the modes of `head_gpu.py`, which says what the figures mean.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_peers import UNIT, Method, one_line
from peaked_activations import Activations, Exact, errors
from protocol import print_table, spread
from torch import Tensor

WRONG = 0.05
LEAST_CALLS, HOST_CALLS, SECONDS_A_ROUND = 3, 2, 2.0
MIB = 2**20


class Effort(NamedTuple):
    """How often everything is called."""

    rounds: int
    calls: int
    warm_up: int = 2


class Clock:
    """CUDA events on a GPU; the wall clock on a CPU, which knows nothing of memory either."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"

    def takes(self, run: Callable[[], Any], calls: int) -> list[float]:
        """Milliseconds of calls one after the other; nothing waits between them."""
        marks: list[Any] = []
        self._wait()
        for _ in range(calls):
            marks.append(self._mark())
            run()
            marks.append(self._mark())
        self._wait()
        return [self._between(*pair) for pair in zip(marks[::2], marks[1::2], strict=True)]

    def host_ms(self, run: Callable[[], Any]) -> float:
        """Milliseconds until a call returns, with the device idle: a full queue would block it."""
        took = []
        for _ in range(HOST_CALLS):
            self._wait()
            started = time.perf_counter()
            run()
            took.append(1e3 * (time.perf_counter() - started))
        self._wait()
        return min(took)

    def extra_mib(self, run: Callable[[], Any]) -> float | None:
        """Most allocated during a call over what was allocated before."""
        if not self.is_gpu:
            run()
            return None
        gc.collect()
        self._wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self._wait()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def free_mib(self) -> float:
        """What can still be allocated."""
        if not self.is_gpu:
            return float("inf")
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0] / MIB)

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after) if self.is_gpu else 1e3 * (after - before))


def call(method: Method, inputs: Activations) -> tuple[Tensor, Tensor | None]:
    """Output and the gradient of its sum with respect to hidden; the head is frozen."""
    if not method.wants_gradient:
        with torch.no_grad():
            return method.head(*inputs[:3]), None
    hidden = inputs.hidden.detach().requires_grad_()
    output = method.head(hidden, inputs.weight, inputs.targets)
    output.backward(torch.ones_like(output))
    if hidden.grad is None or inputs.weight.grad is not None:
        raise RuntimeError("no gradient of hidden arrived, or one of the frozen head did")
    return output.detach(), hidden.grad


def contest(
    methods: Sequence[Method], inputs: Activations, exact: Exact, effort: Effort
) -> dict[str, dict[str, Any]]:
    """Check every method, then let those that are right take turns."""
    clock = Clock(inputs.hidden.device)
    lines = {method.key: _admit(method, inputs, exact, clock, effort) for method in methods}
    for number in range(effort.rounds):
        turn = number % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            line = lines[method.key]
            if line["problem"] is not None:
                continue
            try:
                once = partial(call, method, inputs)
                clock.takes(once, effort.warm_up)
                takes = clock.takes(once, line["calls"])
            except Exception as error:  # a peer may fail in any way, and the others go on
                line["problem"] = one_line(error)
                continue
            line["rounds_ms"].append(statistics.median(takes))
    if lines[UNIT]["problem"] is not None:
        raise RuntimeError(f"the bare product failed: {lines[UNIT]['problem']}")
    units = lines[UNIT]["rounds_ms"]
    for line in lines.values():
        if line["problem"] is None:
            line["ms"] = spread(line["rounds_ms"])
            ratios = zip(line["rounds_ms"], units, strict=True)
            line["over_mm"] = spread([ms / unit for ms, unit in ratios])
    return lines


def _admit(
    method: Method, inputs: Activations, exact: Exact, clock: Clock, effort: Effort
) -> dict[str, Any]:
    """One call for the error, one for memory, one for how often it can be called."""
    line: dict[str, Any] = {
        "title": method.title,
        "is_exact": method.is_exact,
        "problem": None,
        "rounds_ms": [],
    }
    needed = len(inputs.hidden) * len(inputs.weight) * method.bytes_per_logit / MIB
    free = clock.free_mib()
    if needed > free:
        line["problem"] = f"needs some {needed:,.0f} MiB, {free:,.0f} MiB are free"
        return line
    try:
        output, gradient = call(method, inputs)
        if method.key != UNIT:
            line["errors"] = errors(exact, output, gradient)
        del output, gradient
        once = partial(call, method, inputs)
        line["extra_mib"] = clock.extra_mib(once)
        line["host_ms"] = clock.host_ms(once)
        first = clock.takes(once, 1)[0]
    except Exception as error:  # as above: what it says goes into the table
        line["problem"] = one_line(error)
        return line
    seen = {name: error for name, error in line.get("errors", {}).items() if name != "worst_row"}
    # Not `> WRONG`: NaN is wrong too.
    if not all(error <= WRONG for error in seen.values()):
        line["problem"] = "WRONG: " + ", ".join(f"{n} off by {e:.1%}" for n, e in seen.items())
    affordable = int(1e3 * SECONDS_A_ROUND / max(first, 1e-3))
    line["calls"] = min(effort.calls, max(LEAST_CALLS, affordable))
    return line


def print_lines(title: str, lines: dict[str, dict[str, Any]]) -> None:
    """Print the table of one contest."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for line in lines.values():
        found, problem = line.get("errors", {}), line["problem"]
        ms, ratio = line.get("ms"), line.get("over_mm")
        rows.append(
            [
                line["title"],
                "exact" if line["is_exact"] else "APPROX",
                f"{ms['median']:.3f} ({ms['min']:.3f}-{ms['max']:.3f})" if ms else "-",
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-",
                number(line.get("host_ms") if ms else None, ".2f"),
                number(line.get("extra_mib"), ",.0f"),
                number(found.get("gradient"), ".1e"),
                number(found.get("worst_row"), ".1e"),
                number(found.get("output"), ".1e"),
                str(line.get("calls", "-")) if problem is None else problem,
            ]
        )
    header = ["method", "kind", "ms", "/ mm", "host ms", "extra MiB"]
    print_table(title, [*header, "grad error", "worst row", "output error", "calls"], rows)
