"""What QLoRA on Llamas of 1, 3 and 8 billion weights takes of a GPU, and how fast it goes.

Random weights in NF4 with nested scales, LoRA r=16 on all linear layers, activation checkpointing,
bf16, 8-bit AdamW; a step is one row of pairs of 256 + 128 + 128 tokens: 8 pairs for 4,096 packed
tokens, 16 for 8,192. Methods: "lite-orpo"; "embedding on host" and "all on host", the same with
`offload_embedding` (8B: the others' embedding is their head) and with `activation_offloading`
beside it; "padded full logits", the plain loop of step_time.py on the same pairs, each prompt
twice; and TRL's ORPOTrainer where TRL is importable.

Each cell is a process of its own. After two untimed steps come --steps timed ones, with an event
before and after the trunk's forward pass, and around the optimiser. "Reserved" is the allocator's
peak from the first step on, which is what a card must have beside CUDA's own half GiB; "allocated"
is compared with `lite-orpo plan`'s count for the same row. With --limit GIB the process may not
reserve more (`set_per_process_memory_fraction`), and a method that wants more says so. Tokens a
second are those of the packed row, for every method: the same pairs.

Needs torch, triton, transformers, peft, accelerate and bitsandbytes:
PYTHONPATH=.:kernels python benchmarks/fit_gpu.py

Predicted before the first run (arithmetic, no GPU was at hand): 8B at 4,096 tokens with the
embedding on the host reserves 7.0 GiB at most (NF4 linears 3.35, head 0.98, LoRA and 8-bit Adam
0.39, checkpoints 1.0, largest layer 1.2); the plan is within 10 % of "allocated"; padded full
logits take 2.5 GiB more for every 1,000 tokens and half again the time.
"""

import argparse
import importlib.util
import tempfile
from typing import Any

from llama_shapes import SHAPES, quantised_llama, shape_config, with_adapter
from protocol import note, print_table, run_benchmark, run_worker, spread

OURS, ON_HOST, ALL_ON_HOST = "lite-orpo", "embedding on host", "all on host"
FULL_LOGITS, TRL = "padded full logits", "TRL"
ROW_SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {},
    ON_HOST: {"offload_embedding": True},
    ALL_ON_HOST: {"offload_embedding": True, "activation_offloading": True},
}
PROMPT, COMPLETION = 256, 128
PAIR_TOKENS = PROMPT + 2 * COMPLETION
WARM_UP = 2
LOSS_TOLERANCE = 3e-3  # of bf16 activations summed in another order
GIB = 2**30


def methods_of(shape: str) -> list[str]:
    """The methods that a shape can be measured with here."""
    ours = [OURS] if SHAPES[shape].get("tie_word_embeddings") else [OURS, ON_HOST, ALL_ON_HOST]
    if importlib.util.find_spec("trl") is None:
        return [*(m for m in ours if m != ALL_ON_HOST), FULL_LOGITS]
    return [*ours, FULL_LOGITS, TRL]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every cell, print the table, return the figures."""
    cells = []
    for shape in options.shapes:
        for tokens in options.tokens:
            for method in options.methods or methods_of(shape):
                note(f"{shape}, {tokens} tokens, {method}")
                specification = {
                    "shape": shape,
                    "tokens": tokens,
                    "method": method,
                    "device": options.device,
                    "steps": options.steps,
                    "limit": options.limit,
                }
                result = run_worker(__file__, specification, options.threads)
                cells.append({**specification, **result})
            check_losses(cells)
    print_table(
        "QLoRA steps on " + next((c["device_name"] for c in cells), ""),
        ["shape", "tokens", "method", "weights", "allocated", "planned", "reserved", "tokens/s",
         "trunk", "loss + backward", "optimiser"],
        [_line(cell) for cell in cells],
    )  # fmt: skip
    return {"cells": cells}


def check_losses(cells: list[dict[str, Any]]) -> None:
    """Fail where methods of one shape and size do not train alike.

    Raises:
        RuntimeError: losses differ by more than bf16 explains.
    """
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells:
        if cell["out_of_memory"]:
            continue
        other = first.setdefault((cell["shape"], cell["tokens"]), cell)
        for own, expected in zip(cell["losses"], other["losses"], strict=True):
            if not abs(own - expected) <= LOSS_TOLERANCE * abs(expected):
                raise RuntimeError(
                    f"losses differ: {cell['method']} {cell['losses']}, {other['method']} "
                    f"{other['losses']}"
                )


def _line(cell: dict[str, Any]) -> list[str]:
    head = [cell["shape"], f"{cell['tokens']:,}", cell["method"]]
    if cell["out_of_memory"]:
        return [*head, *["out of memory", *["-"] * 7]]

    def gib(name: str) -> str:
        return "-" if cell.get(name) is None else f"{cell[name] / GIB:.2f}"

    split = [f"{cell['seconds'][part]['median']:.3f} s" for part in ("trunk", "rest", "optimiser")]
    memory = [gib(name) for name in ("weights", "allocated", "planned", "reserved")]
    return [*head, *memory, f"{cell['tokens_per_second']:,.0f}", *split]


def work(specification: dict[str, Any]) -> dict[str, Any]:
    """One cell: build the model, take steps, tell what they took."""
    import torch

    device = specification["device"]
    is_cuda = device == "cuda"
    if is_cuda and specification["limit"] is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(specification["limit"] * GIB / total)
    name = torch.cuda.get_device_name() if is_cuda else "the CPU"
    try:
        found = _steps(specification)
    except torch.cuda.OutOfMemoryError:
        return {"device_name": name, "out_of_memory": True}
    return {"device_name": name, "out_of_memory": False, **found}


def _steps(specification: dict[str, Any]) -> dict[str, Any]:
    import torch
    from bitsandbytes.optim import AdamW8bit

    device, tokens = specification["device"], specification["tokens"]
    is_cuda = device == "cuda"
    count = tokens // PAIR_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(specification, count, folder)
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated() if is_cuda else None
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer = AdamW8bit(parameters, lr=1e-4)
        clock = _Clock(is_cuda)
        clock.watch(trainer.model.get_base_model().model)
        losses = []
        for _ in range(WARM_UP + specification["steps"]):
            clock.begin()
            loss = trainer.forward_and_backward(trainer.examples)
            clock.mark("optimiser begins")
            optimizer.step()
            optimizer.zero_grad()
            clock.mark("end")
            losses.append(float(loss))
        steps = clock.steps()[WARM_UP:]
        planned = _planned(specification, count, folder)
    seconds = [step["trunk"] + step["rest"] + step["optimiser"] for step in steps]
    return {
        "weights": weights,
        "allocated": torch.cuda.max_memory_allocated() if is_cuda else None,
        "reserved": torch.cuda.max_memory_reserved() if is_cuda else None,
        "planned": planned,
        "tokens_per_second": tokens / spread(seconds)["median"],
        "seconds": {part: spread([step[part] for step in steps]) for part in steps[0]},
        "losses": losses,
    }


def _trainer(specification: dict[str, Any], count: int, folder: str) -> Any:
    import baselines
    from pair_lengths import PairLength
    from step_methods import BETA, random_texts, word_tokenizer

    # bitsandbytes is imported by ours first, or it may ask a hub for kernels.
    import lite_orpo.trainer  # noqa: F401

    shape, method = specification["shape"], specification["method"]
    vocabulary = shape_config(shape).vocab_size
    setup = baselines.StepSetup(
        model=with_adapter(quantised_llama(shape, specification["device"])),
        tokenizer=word_tokenizer(vocabulary),
        pairs=random_texts([PairLength(PROMPT, COMPLETION, COMPLETION)] * count, vocabulary),
        pairs_per_step=count,
        beta=BETA,
        max_length=PROMPT + COMPLETION,
        device=specification["device"],
        is_bf16=True,
        folder=folder,
    )
    if method == FULL_LOGITS:
        return baselines.full_logits_steps(setup)
    if method == TRL:
        return baselines.trl_steps(setup)
    return baselines.lite_orpo_steps(
        setup,
        prefix_sharing="on",
        max_tokens_per_row=specification["tokens"],
        **ROW_SETTINGS[method],
    )


def _planned(specification: dict[str, Any], count: int, folder: str) -> int | None:
    """Bytes that `lite-orpo plan` counts for the same row."""
    import torch

    from lite_orpo.config.options import LoraOptions, ModelOptions
    from lite_orpo.config.orpo_config import ORPOConfig
    from lite_orpo.data.row_batch import PlannedPair
    from lite_orpo.data.tree_rows import tree_row_batch
    from lite_orpo.memory.plan import plan_memory

    if specification["method"] not in ROW_SETTINGS:
        return None
    shape_config(specification["shape"]).save_pretrained(folder)
    args = ORPOConfig(
        output_dir=folder, use_cpu=specification["device"] == "cpu", bf16=True, report_to="none",
        gradient_checkpointing=True, optim="adamw_8bit", **ROW_SETTINGS[specification["method"]],
    )  # fmt: skip
    pair = PlannedPair([0] * PROMPT, [0] * COMPLETION, [0] * COMPLETION, is_scored=True)
    options = ModelOptions(model_name_or_path=folder, dtype="bfloat16", load_in_4bit=True)
    row = tree_row_batch([pair] * count, nll_on_prompt=True)
    device = torch.device(specification["device"])
    return plan_memory(options, LoraOptions(), args, row, device).total


class _Clock:
    """Marks along each step; on a GPU they are events, read when all steps are through."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._marks: list[dict[str, Any]] = []

    def watch(self, trunk: Any) -> None:
        trunk.register_forward_pre_hook(lambda *_: self.mark("trunk begins", adds=False))
        trunk.register_forward_hook(lambda *_: self.mark("trunk ends"))

    def begin(self) -> None:
        self._marks.append({})
        self.mark("begin")

    def mark(self, name: str, *, adds: bool = True) -> None:
        """Note the time; a mark that is there already is kept unless `adds` replaces it."""
        import time

        import torch

        if not self._marks or (not adds and name in self._marks[-1]):
            return
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[-1][name] = event
        else:
            self._marks[-1][name] = time.perf_counter()

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each step: trunk forward, what is left of forward and backward, optimiser."""
        import torch

        if self._is_cuda:
            torch.cuda.synchronize()
        found = []
        for marks in self._marks:
            trunk = self._between(marks["trunk begins"], marks["trunk ends"])
            whole = self._between(marks["begin"], marks["optimiser begins"])
            optimiser = self._between(marks["optimiser begins"], marks["end"])
            found.append({"trunk": trunk, "rest": whole - trunk, "optimiser": optimiser})
        return found

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self._is_cuda else float(end - start)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["8B", "3B", "1B"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument(
        "--methods", nargs="*", choices=[*ROW_SETTINGS, FULL_LOGITS, TRL], help="default: all"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, help="GiB that a process may reserve")
    run_benchmark(measure, work, parser)


if __name__ == "__main__":
    main()
