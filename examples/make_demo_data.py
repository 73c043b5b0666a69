"""Write the demo's preference pairs: a warm answer with advice and a reason over a cold one.

Run `python examples/make_demo_data.py --out examples/demo_data`; the same seed gives the same
bytes. Chosen and rejected are drawn alike and then matched in length, half of the pairs with the
chosen answer a little longer and half a little shorter, so that no length rule scores.
Held-out questions are about cases that neither the training pairs nor the base model's text
contain; one whole topic has no training pair at all. No model is used here.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from demo_voice import answer, ask
from demo_world import UNSEEN_TOPIC, Case, load_cases

TRAIN_PAIRS = 400
HELD_OUT_PAIRS = 120
MAX_LENGTH_RATIO = 1.25
MIN_MORE_WORDS = 3  # clear enough that the count of tokens, whatever the tokenizer, agrees


def _is_longer(first: str, second: str) -> bool:
    more_words = len(first.split()) - len(second.split())
    return len(first) > len(second) and more_words >= MIN_MORE_WORDS


def matched_answers(case: Case, chosen_is_longer: bool, rng: random.Random) -> tuple[str, str]:
    """Draw (warm, cold) until the asked one is longer in characters and words, but not by much."""
    while True:
        warm, cold = answer(case, "warm", rng), answer(case, "cold", rng)
        longer, shorter = (warm, cold) if chosen_is_longer else (cold, warm)
        if _is_longer(longer, shorter) and len(longer) <= MAX_LENGTH_RATIO * len(shorter):
            return warm, cold


def make_pairs(cases: list[Case], count: int, rng: random.Random) -> list[dict[str, object]]:
    """Word one pair for each of `count` different cases."""
    # Sorting on rng.random() instead of rng.shuffle: its bytes are stable across Pythons.
    drawn = sorted(cases, key=lambda _: rng.random())[:count]
    pairs: list[dict[str, object]] = []
    for index, case in enumerate(drawn):
        warm, cold = matched_answers(case, index % 2 == 0, rng)
        pairs.append(
            {
                "prompt": [{"role": "user", "content": ask(case, rng)}],
                "chosen": [{"role": "assistant", "content": warm}],
                "rejected": [{"role": "assistant", "content": cold}],
            }
        )
    return pairs


def make_splits(seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the rows of train.jsonl and heldout.jsonl."""
    rng = random.Random(seed)
    cases = load_cases()
    train = [case for case in cases if not case.held_out and case.topic != UNSEEN_TOPIC]
    held_out = [case for case in cases if case.held_out]
    return {
        "train": make_pairs(train, TRAIN_PAIRS, rng),
        "heldout": make_pairs(held_out, HELD_OUT_PAIRS, rng),
    }


def main() -> None:
    """Parse the command line and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("demo_data"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in make_splits(options.seed).items():
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (options.out / f"{name}.jsonl").write_bytes(lines.encode())
        print(f"{name}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
