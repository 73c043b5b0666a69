"""What the three `*_in_*.py` examples share: the demo's pairs as token ids, and one batch of them.

Nothing here belongs to the loss; a loop of your own brings its own data.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).parent
DEMO_MODEL = HERE / "demo_model"
IGNORED = -100


def read_rows(count: int) -> list[dict[str, Any]]:
    """The first rows of the demo data: a prompt and two answers, as message lists."""
    with (HERE / "demo_data" / "train.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line) for line in list(stream)[:count]]


def load_pairs(tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Token ids of the first pairs of the demo data; the prompt is a prefix of both sides."""
    pairs = []
    for row in read_rows(count):
        ids = {}
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        for side in ("chosen", "rejected"):
            messages = row["prompt"] + row[side]
            ids[side] = tokenizer.apply_chat_template(messages, return_dict=False)
        pairs.append({"prompt": prompt, **ids})
    return pairs


def collate(pairs: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Chosen sequences, then rejected ones; position t is marked by what it predicts."""
    sequences, targets, completions, nll = [], [], [], []
    for side in ("chosen", "rejected"):
        for number, pair in enumerate(pairs):
            ids, prompt = torch.tensor(pair[side]), len(pair["prompt"])
            in_completion = torch.arange(1, len(ids)) >= prompt
            is_chosen = side == "chosen"
            sequences.append(ids)
            # A rejected prompt is in neither term: leave it out, and the head never sees it.
            targets.append(ids[1:].where(in_completion | is_chosen, torch.tensor(IGNORED)))
            completion = torch.tensor(2 * number + (not is_chosen))
            completions.append(completion.where(in_completion, torch.tensor(-1)))
            nll.append(torch.full((len(ids) - 1,), is_chosen))
    return {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
        "targets": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "completion_ids": pad_sequence(completions, batch_first=True, padding_value=-1),
        "nll_mask": pad_sequence(nll, batch_first=True, padding_value=False),
    }


def fall_of(losses: list[float]) -> str:
    """Where the loss went, in words: the mean of its first and of its last quarter."""
    few = max(1, len(losses) // 4)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps"


def peak_mib() -> float:
    """Most memory this process has held so far, in MiB: on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def run_in_fresh_process(*command: str) -> str:
    """Run a Python script and return the last line that it prints.

    On Linux a child begins with its parent's resident memory as its peak, which would hide what
    it needs itself. This process has loaded torch: so a light one stands in between.
    """
    light = [
        sys.executable,
        "-c",
        "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))",
    ]
    done = subprocess.run([*light, sys.executable, *command], stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout.splitlines()[-1]
