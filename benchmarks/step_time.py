"""Time of a whole training step: prompts shared and packed, padded, and TRL's ORPOTrainer.

"lite-orpo" is our trainer with prefix_sharing="on". "lite-orpo padded" is the same with "off":
separate right-padded sequences, those of like length together in rows of max_tokens_per_row. TRL
pads the whole batch to its longest sequence.

A random Llama (8 layers, D=512, V=16,384, fp32, untied frozen head), LoRA r=16 on all its linear
layers; 2, 4 and 8 pairs a step, with the three sets of lengths in lengths/ (see pair_lengths.py;
only hh_rlhf was counted on real text). Token ids are random, token counts exactly those of the
set in every method. A step is: collate, forward, backward, clip to norm 1, AdamW. Tokenising is
not in it.

Times: for each cell (a set and a batch size) one process holds the methods; they take turns round
by round in a changing order. Each round has a batch of its own, drawn from the set and the same
for all methods, so seconds spread over batches too; ratios are of the same round. Before each take
the weights are put back, outside the clock. First the baseline, whose step needs the most memory,
takes the batch with most padding untimed: whoever meets a fresh heap waits twice as long. (On a
GPU every method takes every batch first.) The losses of a round must agree within 1e-4, and the
gradients' norms within 1e-3 (bf16: 1e-3, 1e-2), or the run fails. A forward hook on the embedding
counts the tokens that pass the trunk, padding too.

Memory: on a CPU one process for each method and cell, because what another method left in the
heap would count, and only for 4 pairs unless --memory says otherwise, because each starts anew;
one step on the round's batch with most padding, after a step on one short pair. "Peak" is the
process's, "extra" its peak over what was resident before the step. glibc keeps freed blocks of up
to 32 MiB in a heap that tears: TRL's same step came to 2.3 GiB or to 3.4. In these processes
blocks of 1 MiB and more go back when they are freed, so that figures repeat within 1 MiB; with
glibc's own settings all are larger. On a GPU the allocator tells each step's extra exactly, so
there the processes of the times say it, for every cell.

Without TRL (or with --baseline full_logits) the baseline is "padded full logits": a plain loop
over TRL's rows with TRL's loss, equal to TRL's to 1e-5 (tests/benchmarks/test_step_time.py). On a
GPU, torch, triton, transformers, peft and accelerate are enough:
PYTHONPATH=.:kernels python benchmarks/step_time.py --device cuda --dtype bf16

Predicted before the first run, fp32 on two cores:
- TRL's time over ours: hh_rlhf 3 with 4 pairs, 4 with 8 (targets); ultrafeedback_like 1.2 to 1.5;
  long_prompt 2. The padded path is nowhere faster than the shared one.
- These lengths were drawn after that was written. Their tokens, padded over shared, are 2.4, 3.0
  and 3.8 for hh_rlhf, 1.8, 2.2 and 2.5 for ultrafeedback_like (2, 4, 8 pairs; 1.17 is without
  padding) and 1.8 for long_prompt: if time follows tokens, ultrafeedback_like comes above 1.5.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
from typing import Any, NamedTuple

from pair_lengths import SET_NAMES, padded_tokens, read_lengths
from protocol import note, peak_mib, print_table, resident_mib, run_benchmark, run_worker, spread
from step_methods import FULL_LOGITS, OURS, PADDED, SIZES, TRL, VOCABULARIES, Stepper

BATCH_SIZES = (2, 4, 8)
# By number of pairs: the whole run is to take twenty minutes on two cores, and steps last from one
# second to fifty. The long prompts are all of one length.
CPU_ROUNDS = {
    "hh_rlhf": {2: 5, 4: 5, 8: 3},
    "ultrafeedback_like": {2: 3, 4: 3, 8: 2},
    "long_prompt": {2: 3, 4: 2, 8: 2},
}
CUDA_ROUNDS = 20
TOLERANCES = {"fp32": {"loss": 1e-4, "norm": 1e-3}, "bf16": {"loss": 1e-3, "norm": 1e-2}}


class Cell(NamedTuple):
    """A set of lengths and a number of pairs in a step."""

    lengths: str
    pairs: int

    def __str__(self) -> str:
        return f"{self.lengths}:{self.pairs}"


def parse_cell(text: str) -> Cell:
    """Read "hh_rlhf:4"."""
    name, _, pairs = text.partition(":")
    if name not in SET_NAMES or not pairs.isdecimal() or int(pairs) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give one of {SET_NAMES} and pairs, as in x:4")
    return Cell(name, int(pairs))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every cell, print the table, return the figures."""
    methods = (OURS, PADDED, _baseline(options.baseline))
    asked = {name: getattr(options, name) for name in ("max_tokens_per_row", "tree_attention")}
    row_settings = {name: value for name, value in asked.items() if value is not None}
    cells, device = {}, ""
    for cell in options.cells:
        rounds = options.rounds or CPU_ROUNDS[cell.lengths].get(cell.pairs, 3)
        if options.device == "cuda":
            rounds = options.rounds or CUDA_ROUNDS
        specification = {
            "lengths": cell.lengths,
            "pairs": cell.pairs,
            "rounds": rounds,
            "device": options.device,
            "dtype": options.dtype,
            "model": options.model,
            "row_settings": row_settings,
            "threads": options.threads,
        }
        note(f"{cell}: {rounds} rounds")
        timing = run_worker(
            __file__, {**specification, "work": "time", "methods": methods}, options.threads
        )
        check_same_work(timing["rounds"], TOLERANCES[options.dtype])
        memory: dict[str, Any] = {}
        if _wants_memory(cell, options):
            for method in methods:
                note(f"{cell}: memory of {method}")
                memory[method] = _memory_alone(method, specification)
        cells[str(cell)] = cell_figures(cell, timing["rounds"], memory)
        device = timing["device"]
        for line in _lines(str(cell), cells[str(cell)]):
            note("  ".join(line))
    _print(cells, options)
    return {
        "benchmark": "step_time",
        "device": device,
        "dtype": options.dtype,
        "commit_as_told": options.commit,
        "row_settings": {"prefix_sharing": "on", **row_settings},
        "sizes": {**SIZES[options.model], "vocabulary": VOCABULARIES[options.model]},
        "trains": "LoRA r=16, head frozen",
        "cells": cells,
    }


def _wants_memory(cell: Cell, options: argparse.Namespace) -> bool:
    return options.device == "cpu" and (
        options.memory == "all" or (options.memory == "four" and cell.pairs == 4)
    )


def _memory_alone(method: str, specification: dict[str, Any]) -> dict[str, Any]:
    alone = {**specification, "work": "memory", "methods": [method]}
    # Read by glibc when the worker starts; not for the times, where each new block costs faults.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    try:
        return run_worker(__file__, alone, specification["threads"])
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _baseline(asked: str) -> str:
    if asked != "auto":
        return {"trl": TRL, "full_logits": FULL_LOGITS}[asked]
    has_trl = all(importlib.util.find_spec(package) for package in ("trl", "datasets"))
    return TRL if has_trl else FULL_LOGITS


def check_same_work(rounds: list[dict[str, Any]], tolerances: dict[str, float]) -> None:
    """Refuse figures of methods that did not compute the same.

    Raises:
        RuntimeError: a loss or the norm of a gradient is off.
    """
    for number, takes in enumerate(rounds):
        for key, tolerance in tolerances.items():
            values = {method: take[key] for method, take in takes.items()}
            first = values[next(iter(values))]
            # Not any(... > ...): a NaN is no agreement.
            if not all(abs(value - first) <= tolerance * abs(first) for value in values.values()):
                raise RuntimeError(f"round {number + 1}: {key} differs: {values}")


def cell_figures(
    cell: Cell, rounds: list[dict[str, Any]], memory: dict[str, Any]
) -> dict[str, Any]:
    """Medians of a cell, and what others took over ours in the same round."""
    lengths = read_lengths(cell.lengths)

    def values(method: str, key: str) -> list[float]:
        return [takes[method][key] for takes in rounds if takes[method].get(key) is not None]

    def over_ours(method: str, key: str) -> dict[str, float]:
        pairs = zip(values(method, key), values(OURS, key), strict=True)
        return spread([theirs / ours for theirs, ours in pairs])

    figures: dict[str, Any] = {
        "length_means": lengths.means(),
        "sharing_ratio": lengths.sharing_ratio(),
        "expected_padded_over_shared_tokens": lengths.padding_ratio(cell.pairs),
        "rounds": len(rounds),
        "methods": {},
        "takes": rounds,
        "memory_takes": memory,
    }
    for method in rounds[0]:
        extra = values(method, "extra_mib")
        figures["methods"][method] = {
            "seconds": spread(values(method, "seconds")),
            "cpu_seconds": spread(values(method, "cpu_seconds")),
            "over_ours": over_ours(method, "seconds"),
            "cpu_over_ours": over_ours(method, "cpu_seconds"),
            "tokens": statistics.fmean(values(method, "tokens")),
            "tokens_over_ours": over_ours(method, "tokens"),
            "peak_mib": memory.get(method, {}).get("peak_mib"),
            "extra_mib": max(extra) if extra else memory.get(method, {}).get("extra_mib"),
        }
    return figures


def _lines(name: str, figures: dict[str, Any]) -> list[list[str]]:
    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    def ratio(of: dict[str, float]) -> str:
        return f"{of['median']:.2f} ({of['min']:.2f}-{of['max']:.2f})"

    lines = []
    for method, got in figures["methods"].items():
        seconds = got["seconds"]
        digits = 2 if seconds["min"] >= 0.2 else 4
        lines.append(
            [
                name,
                method,
                f"{seconds['median']:.{digits}f} "
                f"({seconds['min']:.{digits}f}-{seconds['max']:.{digits}f})",
                "1" if method == OURS else ratio(got["over_ours"]),
                "1" if method == OURS else f"{got['cpu_over_ours']['median']:.2f}",
                f"{got['tokens']:,.0f}",
                f"{got['tokens_over_ours']['median']:.2f}",
                mib(got["peak_mib"]),
                mib(got["extra_mib"]),
            ]
        )
    return lines


def _print(cells: dict[str, Any], options: argparse.Namespace) -> None:
    size = SIZES[options.model]
    rounds = ", ".join(sorted({str(figures["rounds"]) for figures in cells.values()}))
    print_table(
        f"One step, {size['layers']} layers, D={size['width']}, V={VOCABULARIES[options.model]:,}, "
        f"LoRA, frozen head, {options.device}, {options.dtype}; {options.threads} threads, "
        f"medians of {rounds} rounds",
        ["lengths:pairs", "method", "s", "/ ours", "CPU s / ours", "tokens", "/ ours"]
        + ["peak MiB", "extra MiB"],
        [line for name, figures in cells.items() for line in _lines(name, figures)],
    )


# ---- in a process of its own ----


def work(specification: dict[str, Any]) -> dict[str, Any]:
    """Times of all methods in one cell, or the memory of one method."""
    import torch

    torch.set_num_threads(specification["threads"])
    lengths = read_lengths(specification["lengths"])
    batches = list(lengths.batches(specification["pairs"], specification["rounds"]))
    widest = max(range(len(batches)), key=lambda number: padded_tokens(batches[number]))
    with tempfile.TemporaryDirectory() as folder:
        methods = specification["methods"]
        steppers = {m: Stepper(m, specification, lengths, batches, folder) for m in methods}
        for stepper in steppers.values():
            stepper.warm_up()
        if specification["work"] == "memory":
            return _memory(steppers[methods[0]], widest)
        if specification["device"] == "cuda":
            # Kernels are compiled and the allocator grows with each new shape.
            _times(steppers, range(len(batches)))
        else:
            steppers[methods[-1]].take(widest)
        takes = _times(steppers, range(len(batches)))
        return {"rounds": takes, "device": _device_name(specification)}


def _times(steppers: dict[str, Stepper], rounds: range) -> list[dict[str, Any]]:
    order, takes = list(steppers), []
    for number in rounds:
        took = {method: steppers[method].take(number) for method in order}
        takes.append({method: took[method] for method in steppers})
        order = order[1:] + order[:1]
    return takes


def _memory(stepper: Stepper, widest: int) -> dict[str, Any]:
    before, peak_before = resident_mib(), peak_mib()
    take = stepper.take(widest)
    return {
        "resident_before_mib": before,
        "peak_before_mib": peak_before,
        "peak_mib": peak_mib(),
        "extra_mib": None if before is None else peak_mib() - before,
        "tokens": take["tokens"],
    }


def _device_name(specification: dict[str, Any]) -> str:
    import torch

    return torch.cuda.get_device_name() if specification["device"] == "cuda" else "cpu"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [Cell(name, pairs) for name in SET_NAMES for pairs in BATCH_SIZES]
    parser.add_argument(
        "--cells",
        type=lambda text: [parse_cell(cell) for cell in text.split(",")],
        default=every,
        help="such as hh_rlhf:4,long_prompt:8; default: all",
    )
    parser.add_argument("--rounds", type=int, help="default: 2 to 5 by cell; 20 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCES, default="fp32", help="bf16: autocast")
    parser.add_argument("--baseline", choices=("auto", "trl", "full_logits"), default="auto")
    parser.add_argument("--model", choices=SIZES, default="small", help="tiny: for the tests")
    parser.add_argument("--max-tokens-per-row", type=int, help="default: ORPOConfig's")
    parser.add_argument("--tree-attention", help="default: ORPOConfig's")
    parser.add_argument(
        "--memory", choices=("four", "all", "none"), default="four", help="cells, on a CPU"
    )
    parser.add_argument("--commit", help="of the code, where there is no git")
    run_benchmark(measure, work, parser)
