"""What the loss costs in one whole training step: memory and time, ours against TRL's trainer.

A tiny Llama with a large vocabulary (2 layers, D=256, V=128,256, untied head, fp32, CPU), LoRA
r=16 on all its linear layers but the head, two pairs of 512 + 512 tokens (prompt 256, completions
256 each). Each figure is a process of its own that makes model and trainer, then takes steps
(forward, backward, SGD). "Extra" is its ru_maxrss over that of a twin process, same trainer and
same trunk, whose loss is `hidden.sum()`, after the first step and after the last; how the heap
grows differs by some 40 MiB between runs, in the twin too. The four kinds of process take turns;
figures are medians over rounds. The losses of both trainers must agree, or the run fails.

With --full the whole model trains. Both then own a gradient of the head as large as the head
(125 MiB), which is no temporary: the twin gets one too.

Predicted before the first run:
- lite-orpo's extra memory 80 MiB (64 workspace, [rows, D] tensors, buffers of the GEMM); with
  --full the same and 10 more. TRL 3,500 MiB (3.5 logits tensors of 1,002 MiB).
- time of a step 0.5 of TRL's: two GEMMs for both, but 1,534 rows instead of 2,048 (rejected
  prompts are not scored) and no pass over fresh pages of logits.
"""

import argparse
import tempfile
import time
from typing import Any

from protocol import note, peak_mib, print_table, resident_mib, run_benchmark, run_worker, spread

LAYERS, WIDTH, VOCABULARY = 2, 256, 128_256
PAIRS, PROMPT_TOKENS, COMPLETION_TOKENS = 2, 256, 256
WORDS = 2000
BETA = 0.1
TRAINERS = ("lite-orpo", "TRL")
LOSS_TOLERANCE = 1e-4


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Interleave the four kinds of process and print what they cost."""
    takes: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for trainer in TRAINERS:
            for has_loss in (False, True):
                name = trainer if has_loss else f"{trainer} trunk only"
                note(f"round {number + 1} of {options.rounds}: {name}")
                specification = {
                    "trainer": trainer,
                    "has_loss": has_loss,
                    "trains_everything": options.full,
                    "steps": options.steps,
                    "threads": options.threads,
                }
                take = run_worker(__file__, specification, options.threads)
                takes.setdefault(name, []).append(take)
    _check_same_work(takes)
    figures = {trainer: _figures(takes, trainer) for trainer in TRAINERS}
    same_round = list(zip(takes["lite-orpo"], takes["TRL"], strict=True))
    ratios = {
        clock: [ours[clock] / theirs[clock] for ours, theirs in same_round]
        for clock in ("best_seconds", "best_cpu_seconds")
    }
    _print(figures, ratios, options)
    return {
        "benchmark": "step_memory",
        "sizes": {
            "layers": LAYERS,
            "hidden": WIDTH,
            "vocabulary": VOCABULARY,
            "pairs": PAIRS,
            "tokens_per_sequence": PROMPT_TOKENS + COMPLETION_TOKENS,
            "trains": "everything" if options.full else "LoRA r=16, head frozen",
            "dtype": "float32",
        },
        "rounds": options.rounds,
        "steps_per_process": options.steps,
        "figures": figures,
        "step_time_over_trl": spread(ratios["best_seconds"]),
        "step_cpu_time_over_trl": spread(ratios["best_cpu_seconds"]),
        "takes": takes,
    }


def _check_same_work(takes: dict[str, list[dict[str, Any]]]) -> None:
    for ours, theirs in zip(takes["lite-orpo"], takes["TRL"], strict=True):
        for left, right in zip(ours["losses"], theirs["losses"], strict=True):
            if not abs(left - right) <= LOSS_TOLERANCE:
                raise RuntimeError(f"the losses differ: {ours['losses']}, TRL {theirs['losses']}")


def _figures(takes: dict[str, list[dict[str, Any]]], trainer: str) -> dict[str, Any]:
    with_loss, trunk = takes[trainer], takes[f"{trainer} trunk only"]
    both = list(zip(with_loss, trunk, strict=True))
    for take in trunk:
        if take["peak_mib"] <= take["peak_before_mib"]:
            note(f"{trainer}: making the model took more than a step; extra is a lower bound")
    return {
        "extra_mib": spread([loss["peak_mib"] - base["peak_mib"] for loss, base in both]),
        "extra_first_step_mib": spread(
            [loss["peak_first_step_mib"] - base["peak_first_step_mib"] for loss, base in both]
        ),
        "peak_mib": spread([take["peak_mib"] for take in with_loss]),
        "step_seconds": spread([take["best_seconds"] for take in with_loss]),
        "step_cpu_seconds": spread([take["best_cpu_seconds"] for take in with_loss]),
        "trunk_seconds": spread([take["best_seconds"] for take in trunk]),
        "loss": with_loss[0]["losses"][0],
    }


def _print(
    figures: dict[str, Any], ratios: dict[str, list[float]], options: argparse.Namespace
) -> None:
    rows = []
    for trainer, got in figures.items():
        first, all_steps = got["extra_first_step_mib"], got["extra_mib"]
        rows.append(
            [
                trainer,
                *(
                    f"{e['median']:,.0f} ({e['min']:,.0f}-{e['max']:,.0f})"
                    for e in (first, all_steps)
                ),
                f"{got['peak_mib']['median']:,.0f}",
                f"{got['step_seconds']['median']:.2f}",
                f"{got['trunk_seconds']['median']:.2f}",
                f"{got['loss']:.6f}",
            ]
        )
    trains = "whole model trains" if options.full else "LoRA, frozen head"
    print_table(
        f"One step, V={VOCABULARY:,}, D={WIDTH}, {PAIRS} pairs of "
        f"{PROMPT_TOKENS + COMPLETION_TOKENS} tokens a side, fp32, {trains}; "
        f"{options.threads} threads, medians of {options.rounds} rounds",
        [
            "trainer",
            "extra MiB, step 1",
            f"extra MiB, {options.steps} steps",
            "peak MiB",
            "step s",
            "trunk only s",
            "loss",
        ],
        rows,
    )
    for clock, name in (("best_seconds", "step time"), ("best_cpu_seconds", "CPU time")):
        of = spread(ratios[clock])
        print(
            f"{name} over TRL's, same round: median {of['median']:.2f} "
            f"({of['min']:.2f} to {of['max']:.2f})"
        )


def work(specification: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: make model and trainer, take the steps, say what they took."""
    import torch
    from baselines import TRAINERS as FACTORIES

    torch.set_num_threads(specification["threads"])
    model = _model(specification["trains_everything"])
    tokenizer, pairs = _tokenizer(), _pairs()
    losses, seconds, cpu_seconds, peaks = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        training = FACTORIES[specification["trainer"]](model, tokenizer, pairs, BETA, folder)
        shape = [2 * PAIRS, PROMPT_TOKENS + COMPLETION_TOKENS]
        assert list(training.input_ids.shape) == shape and bool(training.attention_mask.all())
        parameters = [p for p in model.parameters() if p.requires_grad]
        # SGD keeps no state, so that the step is the loss's and the trunk's alone.
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        before, peak_before = resident_mib(), peak_mib()
        for _ in range(specification["steps"]):
            started, cpu_started = time.perf_counter(), time.process_time()
            if specification["has_loss"]:
                losses.append(training.forward_and_backward())
            else:
                _trunk_only(model, training)
            assert all(p.grad is not None for p in parameters), "a gradient is missing"
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            peaks.append(peak_mib())
    # The first step meets cold caches; it counts for memory, not for time.
    return {
        "resident_before_mib": before,
        "peak_before_mib": peak_before,
        "peak_first_step_mib": peaks[0],
        "peak_mib": peaks[-1],
        "losses": losses,
        "seconds": seconds,
        "best_seconds": min(seconds[1:] or seconds),
        "best_cpu_seconds": min(cpu_seconds[1:] or cpu_seconds),
    }


def _trunk_only(model: Any, training: Any) -> None:
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train()
    hidden = causal_lm.model(
        input_ids=training.input_ids, attention_mask=training.attention_mask, use_cache=False
    ).last_hidden_state
    total = hidden.sum()
    head = causal_lm.lm_head.weight
    if head.requires_grad:
        total = total + head.sum()
    total.backward()


def _model(trains_everything: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    )
    if trains_everything:
        return model
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )
    return get_peft_model(model, lora)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Words lie all over the vocabulary, as real targets do.
    words = {f"w{number}": 3 + number * ((VOCABULARY - 3) // WORDS) for number in range(WORDS)}
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **words}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def _pairs() -> list[dict[str, str]]:
    import random

    generator = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(tokens))

    # BOS and EOS are the tokens that are missing here.
    return [
        {
            "prompt": text(PROMPT_TOKENS - 1),
            "chosen": " " + text(COMPLETION_TOKENS - 1),
            "rejected": " " + text(COMPLETION_TOKENS - 1),
        }
        for _ in range(PAIRS)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=2, help="steps per process, default: 2")
    parser.add_argument("--full", action="store_true", help="train the whole model, not LoRA")
    run_benchmark(measure, work, parser)
