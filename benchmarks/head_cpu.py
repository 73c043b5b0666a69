"""The fused head alone on a CPU, forward and backward with a frozen head, against its peers.

Shapes of SmolLM2-135M's head and of Qwen2.5-0.5B's. Times: all methods take turns in one process;
each figure is the median over rounds of its ratio to the eager expression (to a bare
`torch.mm(hidden, weight.T)` in the second column) in the same round. Memory: a process for each
method, ru_maxrss over a process that only makes the inputs. Error: the gradient of the hidden
states against fp64 arithmetic on the same inputs, as the norm over all rows that were looked at
and for the worst row.

Before a case every method runs on 1/16 of the rows; that also warms it up and gives the rows of
the error column. A method whose work is linear in rows and would take longer than --limit seconds
on all of them is not run on them: its time, 16 times the small one, is marked ~ and it has no
memory figure. Any other that took longer than --limit is not run again in further rounds.

Inputs are synthetic and peaked: a random flat softmax would flatter any gradient. Hidden states
are margin * W[target] + noise with margins of 5 to 25 nats, so that tokens range from unlikely to
memorised. Every method here is exact: none is faster for the peaks.

Predicted before the first run, on a CPU without bf16 instructions:
- fp32 time over eager's: lite-orpo 0.6 (the same two GEMMs, no traffic of full logits), TRL's
  chunked 1.0 (three GEMMs, several passes per tile), torch's 1.2 (three GEMMs in small chunks).
- extra memory for 1024 x 49,152 and 512 x 151,936: eager 600 and 900 MiB (3 logits tensors),
  lite-orpo 75 MiB in both, TRL's 500 and 300, torch's under 50.
- bf16 over eager's: lite-orpo 0.05, because eager has no fast GEMM.
- gradient error, fp32: 1e-6 for all, worst row 1e-6 for lite-orpo and 1e-3 or more for the rest;
  bf16: 2e-3 for lite-orpo, 4e-3 for eager.
"""

import argparse
import gc
import time
from typing import Any

from protocol import note, peak_mib, print_table, run_benchmark, run_worker, spread

CASES = {
    "smollm2-fp32": {"rows": 1024, "width": 576, "vocabulary": 49_152, "dtype": "float32"},
    "qwen2.5-fp32": {"rows": 512, "width": 896, "vocabulary": 151_936, "dtype": "float32"},
    "smollm2-bf16": {"rows": 1024, "width": 576, "vocabulary": 49_152, "dtype": "bfloat16"},
    "qwen2.5-bf16": {"rows": 512, "width": 896, "vocabulary": 151_936, "dtype": "bfloat16"},
}
METHODS = ("eager", "lite_orpo", "trl_chunked", "torch_chunked")
UNIT = "mm"
SMALL_SHARE = 16
# Two plain products of all rows; the others cast or read the head once per chunk.
LINEAR_IN_ROWS = ("eager", UNIT)
LEAST_MARGIN, MOST_MARGIN, NOISE = 5.0, 25.0, 2.5


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every case and print its table."""
    results = {}
    for name in options.cases:
        case = {**CASES[name], "threads": options.threads}
        note(f"{name}: times")
        timing = run_worker(
            __file__,
            {**case, "work": "time", "rounds": options.rounds, "limit": options.limit},
            options.threads,
        )
        timed = [method for method in METHODS if method not in timing["projected_seconds"]]
        extra = _extra_memory(name, case, timed, options)
        results[name] = {"case": CASES[name], "methods": _figures(timing, extra), "takes": timing}
        _print(name, results[name], options)
    return {
        "benchmark": "head_cpu",
        "rounds": options.rounds,
        "memory_rounds": options.memory_rounds,
        "limit_seconds": options.limit,
        "results": results,
    }


def _extra_memory(
    name: str, case: dict[str, Any], methods: list[str], options: argparse.Namespace
) -> dict[str, list[float]]:
    extra: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(options.memory_rounds):
        note(f"{name}: memory, round {number + 1} of {options.memory_rounds}")
        peaks = {
            method: run_worker(
                __file__, {**case, "work": "memory", "method": method}, options.threads
            )["peak_mib"]
            for method in ("inputs", *methods)
        }
        for method in methods:
            extra[method].append(peaks[method] - peaks["inputs"])
    return extra


def _figures(timing: dict[str, Any], extra: dict[str, list[float]]) -> dict[str, Any]:
    def takes(method: str) -> dict[int, float]:
        if method in timing["projected_seconds"]:
            return dict.fromkeys(range(len(timing["rounds"])), timing["projected_seconds"][method])
        return {i: took[method] for i, took in enumerate(timing["rounds"]) if method in took}

    def ratio(method: str, other: str) -> dict[str, float]:
        ones, others = takes(method), takes(other)
        return spread([ones[i] / others[i] for i in ones if i in others])

    return {
        method: {
            "seconds": spread(list(takes(method).values())),
            "rounds": len(takes(method)),
            "over_eager": ratio(method, "eager"),
            "over_mm": ratio(method, UNIT),
            "is_projected": {m: m in timing["projected_seconds"] for m in (method, "eager", UNIT)},
            "extra_mib": spread(extra[method]) if extra.get(method) else None,
            "gradient_error": timing["gradient_errors"].get(method),
        }
        for method in (*METHODS, UNIT)
    }


def _print(name: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    titles = {
        "eager": "eager",
        "lite_orpo": "lite-orpo",
        "trl_chunked": "TRL ChunkedLogProbFunction",
        "torch_chunked": "torch F.linear_cross_entropy",
        UNIT: "bare torch.mm(h, W.T)",
    }
    rows = []
    for method, got in result["methods"].items():
        guessed = got["is_projected"]
        own = "~" if guessed[method] else ""
        error, extra = got["gradient_error"], got["extra_mib"]
        rows.append(
            [
                titles[method],
                f"{own or ('~' if guessed['eager'] else '')}{got['over_eager']['median']:.2f}",
                f"{own or ('~' if guessed[UNIT] else '')}{got['over_mm']['median']:.1f}",
                f"{own}{got['seconds']['median']:.2f}",
                f"{extra['median']:,.0f}" if extra else "-",
                f"{error['norm']:.1e}" if error else "-",
                f"{error['worst_row']:.1e}" if error else "-",
            ]
        )
    case = result["case"]
    print_table(
        f"{name}: D={case['width']}, V={case['vocabulary']:,}, {case['rows']} rows, "
        f"{case['dtype']}; {options.threads} threads, medians of {options.rounds} rounds",
        ["method", "/ eager", "/ mm", "s", "extra MiB", "grad error", "worst row"],
        rows,
    )


def work(specification: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: times of all methods, or the memory of one."""
    import torch

    torch.set_num_threads(specification["threads"])
    if specification["work"] == "time":
        return _times(specification)
    hidden, weight, targets = _inputs(specification)
    before = peak_mib()
    if specification["method"] != "inputs":
        _forward_and_backward(specification["method"], hidden, weight, targets)
    return {"peak_before_mib": before, "peak_mib": peak_mib()}


def _times(specification: dict[str, Any]) -> dict[str, Any]:
    hidden, weight, targets = _inputs(specification)
    few = slice(None, specification["rows"] // SMALL_SHARE)
    exact = _exact_gradient(hidden[few], weight, targets[few])
    small, errors, projected = {}, {}, {}
    for method in (*METHODS, UNIT):
        # Once for the imports and the thread pool, on next to nothing.
        _forward_and_backward(method, hidden[:2], weight[:4096], targets[:2] % 4096)
        seconds, gradient = _timed(method, hidden[few], weight, targets[few])
        small[method] = seconds
        if gradient is not None:
            errors[method] = _errors(gradient, exact)
        if method in LINEAR_IN_ROWS and seconds * SMALL_SHARE > specification["limit"]:
            projected[method] = seconds * SMALL_SHARE
    del exact
    rounds: list[dict[str, float]] = []
    order = [method for method in (*METHODS, UNIT) if method not in projected]
    for _ in range(specification["rounds"]):
        rounds.append({m: _timed(m, hidden, weight, targets)[0] for m in order})
        order = [m for m in order if rounds[-1].get(m, 0.0) <= specification["limit"]]
        order = order[1:] + order[:1]
    return {
        "rounds": rounds,
        "projected_seconds": projected,
        "seconds_on_few_rows": small,
        "gradient_errors": errors,
    }


def _timed(method: str, hidden: Any, weight: Any, targets: Any) -> tuple[float, Any]:
    gc.collect()
    started = time.perf_counter()
    gradient = _forward_and_backward(method, hidden, weight, targets)
    return time.perf_counter() - started, gradient


def _forward_and_backward(method: str, hidden: Any, weight: Any, targets: Any) -> Any:
    """Gradient of the summed nll with respect to `hidden`; nothing for the bare product."""
    import torch
    from baselines import PEERS

    if method == UNIT:
        torch.mm(hidden, weight.t())
        return None
    leaf = hidden.detach().requires_grad_()
    logps = PEERS[method].head(leaf, weight, targets)
    logps.backward(torch.full_like(logps, -1.0))
    assert leaf.grad is not None and weight.grad is None
    return leaf.grad


def _inputs(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Peaked hidden states [M, D], weight [V, D] with rows of about norm 1, targets [M]."""
    import torch

    dtype = getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = case["rows"], case["width"], case["vocabulary"]
    weight = torch.empty(vocabulary, width, dtype=dtype)
    # In blocks: a second copy of the weight in fp32 would hide what is measured.
    for block in weight.split(1024):
        block.copy_(torch.randn(block.shape, generator=generator) * width**-0.5)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    margins = torch.empty(rows, 1).uniform_(LEAST_MARGIN, MOST_MARGIN, generator=generator)
    noise = NOISE * torch.randn(rows, width, generator=generator)
    hidden = (margins * weight[targets].float() + noise).to(dtype)
    return hidden, weight, targets


def _exact_gradient(hidden: Any, weight: Any, targets: Any) -> Any:
    """The gradient in fp64: softmax without the target times the head, minus q times its row."""
    import torch

    rows = hidden.double()
    logits = torch.cat([rows @ block.double().t() for block in weight.split(8192)], dim=1)
    column = targets.unsqueeze(1)
    own = logits.gather(1, column)
    rest = torch.logsumexp(logits.scatter(1, column, float("-inf")), dim=1, keepdim=True)
    miss = torch.sigmoid(rest - own)
    shares = logits.sub_(rest).exp_().scatter_(1, column, 0.0)
    mean_row = torch.zeros_like(rows)
    for block, share in zip(weight.split(8192), shares.split(8192, dim=1), strict=True):
        mean_row += share @ block.double()
    return miss * (mean_row - weight[targets].double())


def _errors(gradient: Any, exact: Any) -> dict[str, float]:
    difference = (gradient.double() - exact).norm(dim=1)
    return {
        "norm": float(difference.norm() / exact.norm()),
        "worst_row": float((difference / exact.norm(dim=1)).max()),
        "rows": len(exact),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of times, default: 5")
    parser.add_argument("--memory-rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds, default: 30")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    run_benchmark(measure, work, parser)
