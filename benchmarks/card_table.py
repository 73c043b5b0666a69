"""What Llama-shaped models of three sizes take on a GPU, computed by `lite-orpo plan`'s own count.

Nothing is measured here: weights, adapter, optimiser and one packed row of pairs (256 + 128 + 128
tokens) through the models' layers without data, bf16 autocast, LoRA r=16 on all linear layers,
activation checkpointing, 8-bit AdamW. "On the card" adds 0.5 GiB for CUDA's own and 5 % for the
allocator.
"""

import argparse
import tempfile

import torch
from llama_shapes import shape_config
from protocol import note, print_table

from lite_orpo.cli.plan import GIB, on_the_card
from lite_orpo.config.options import LoraOptions, ModelOptions
from lite_orpo.config.orpo_config import ORPOConfig
from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.tree_rows import tree_row_batch
from lite_orpo.memory.plan import MemoryPlan, plan_memory

PAIR = PlannedPair([1] * 256, [2] * 128, [3] * 128, is_scored=True)


ON_HOST = {"offload_embedding": True}
ALL_ON_HOST = {"offload_embedding": True, "activation_offloading": True}
# What is in memory in which way; the embedding of 1B and 3B is their head too, and cannot go.
LINES: tuple[tuple[str, int, str, dict[str, bool]], ...] = (
    ("1B", 4, "", {}),
    ("1B", 16, "", {}),
    ("3B", 4, "", {}),
    ("3B", 16, "", {}),
    ("8B", 4, "", {}),
    ("8B", 4, "embedding on the host", ON_HOST),
    ("8B", 4, "embedding and activations on the host", ALL_ON_HOST),
    ("8B", 16, "", {}),
)


def plan_of(shape: str, bits: int, tokens: int, settings: dict[str, bool]) -> MemoryPlan:
    """The plan of one model, in 4 or 16 bits, with rows of so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        shape_config(shape).save_pretrained(folder)
        args = ORPOConfig(
            output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=True,
            optim="paged_adamw_8bit", report_to="none", **settings,
        )  # fmt: skip
        row = tree_row_batch([PAIR] * (tokens // PAIR.tree_tokens), nll_on_prompt=True)
        options = ModelOptions(model_name_or_path=folder, dtype="bfloat16", load_in_4bit=bits == 4)
        return plan_memory(options, LoraOptions(), args, row, torch.device("cuda"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096, 8192])
    options = parser.parse_args()
    lines = []
    for shape, bits, where, settings in LINES:
        name = f"{shape}, {'NF4' if bits == 4 else 'bf16'}{', ' + where if where else ''}"
        line = [name]
        for tokens in options.tokens:
            note(f"{name}, {tokens} tokens")
            plan = plan_of(shape, bits, tokens, settings)
            line.append(f"{on_the_card(plan) / GIB:.1f} GiB ({plan.total / GIB:.1f})")
        lines.append(line)
    print_table(
        "On the card, and in brackets what the allocator is asked for; computed, not measured",
        ["Llama-shaped, LoRA on all layers", *(f"{tokens:,}" for tokens in options.tokens)],
        lines,
    )


if __name__ == "__main__":
    main()
