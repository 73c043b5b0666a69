"""In a process of its own: what training steps take beyond what was there before them, in MiB."""

import gc
import json
import resource
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "data")]

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from tiny_models import tiny_model, trainer_for, with_lora  # noqa: E402

PROMPT, COMPLETION = 120, 60
WIDE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def rows(count: int) -> list[dict[str, str]]:
    """Pairs of about 250 tokens (a character each)."""
    return [
        {
            "prompt": "p" * PROMPT,
            "chosen": "c" * COMPLETION + f"{i:04d}",
            "rejected": "r" * COMPLETION + f"{i:04d}",
        }
        for i in range(count)
    ]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    # Not ru_maxrss: a process inherits that of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM")]
    return int(peak.split()[1]) / 1024


def measure(case: dict) -> float:
    """What a step takes; `case` has the family, its settings, the trainer's, and `is_full`."""
    model = tiny_model(case["family"], **case["model"])
    if not case["is_full"]:
        model = with_lora(model, r=16)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(model, folder, rows(8), **case["settings"])
    trainer.accelerator.prepare_model(trainer.model)  # autocast, as Trainer's loop has it
    pairs = list(trainer.train_dataset)
    if trainer.args.is_checkpointing:  # which Trainer turns on in train() only
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(batch: list) -> None:
        entries, _ = trainer.get_batch_samples(iter([{"pairs": batch}]), 1, trainer.args.device)
        trainer.training_step(trainer.model, entries[-1])

    short = {**pairs[0]}
    for column in ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"):
        short[column] = short[column][:3]
    step([short])  # what a first step loads and allocates for good, gradients included
    gc.collect()
    before = resident_mib()
    forget_peak()
    step(pairs)
    return peak_mib() - before


def main() -> None:
    """Argument: cases by name, as JSON; prints the MiB of each as JSON."""
    torch.set_num_threads(1)
    found = {}
    for name, case in json.loads(sys.argv[1]).items():
        found[name] = measure(case)
        AcceleratorState._reset_state(reset_partial_state=True)  # the next may have another dtype
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
