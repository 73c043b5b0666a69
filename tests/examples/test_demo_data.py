"""What the shipped demo claims about its preference pairs and its base model.

No trainer is used here: that the demo learns the preference is tested where the trainer is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "demo_data"
MODEL = EXAMPLES / "demo_model"


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def read_pairs(split: str) -> list[Pair]:
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [Pair(*(row[field][0]["content"] for field in Pair._fields)) for row in rows]


TRAIN, HELD_OUT = read_pairs("train"), read_pairs("heldout")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def accuracy(score: Callable[[str], float]) -> float:
    """Share of held-out pairs in which the chosen answer scores higher; a tie counts half."""
    gaps = [score(pair.chosen) - score(pair.rejected) for pair in HELD_OUT]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)


def majority_on_train(feature: Callable[[str], Hashable]) -> Callable[[str], float]:
    """Return the best rule on one feature: per value, the side on which train has it more."""
    votes: Counter[Hashable] = Counter()
    for pair in TRAIN:
        votes[feature(pair.chosen)] += 1
        votes[feature(pair.rejected)] -= 1
    return lambda answer: (votes[feature(answer)] > 0) - (votes[feature(answer)] < 0)


def words(answer: str) -> list[str]:
    return re.findall(r"\w+", answer.lower())


def render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: bool
) -> list[int]:
    return tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"]


def run_script(name: str, *options: str) -> None:
    subprocess.run([sys.executable, EXAMPLES / name, *options], check=True, capture_output=True)


def test_committed_pairs_are_what_the_script_writes(tmp_path: Path) -> None:
    run_script("make_demo_data.py", "--out", str(tmp_path))
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_splits_are_disjoint_and_large_enough() -> None:
    assert len(TRAIN) == 400
    assert len(HELD_OUT) == 120
    for field in Pair._fields:
        train = {getattr(pair, field) for pair in TRAIN}
        held_out = {getattr(pair, field) for pair in HELD_OUT}
        assert len(train) >= 0.99 * len(TRAIN)
        assert not train & held_out


def test_held_out_has_a_topic_without_training_pairs() -> None:
    def asked(pairs: list[Pair], thing: str) -> int:
        return sum(thing in pair.prompt for pair in pairs)

    for thing in ("guitar", "violin", "cello", "banjo", "ukulele"):
        assert asked(TRAIN, thing) == 0
        assert asked(HELD_OUT, thing) > 0


@pytest.mark.parametrize(
    "length",
    [pytest.param(len, id="characters"), pytest.param(lambda a: len(a.split()), id="words")],
)
def test_length_does_not_give_the_choice_away(length: Callable[[str], int]) -> None:
    assert 0.4 <= accuracy(length) <= 0.6


def test_token_count_does_not_give_the_choice_away(tokenizer: PreTrainedTokenizerBase) -> None:
    assert 0.4 <= accuracy(lambda answer: len(tokenizer(answer)["input_ids"])) <= 0.6


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_one_end_does_not_give_the_choice_away(
    position: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    def token(answer: str) -> Hashable:
        return tokenizer(answer)["input_ids"][position]

    assert accuracy(majority_on_train(token)) <= 0.6
    assert accuracy(majority_on_train(lambda answer: words(answer)[position])) <= 0.6


def test_no_single_word_or_mark_gives_the_choice_away() -> None:
    vocabulary = Counter(word for pair in TRAIN for side in pair[1:] for word in set(words(side)))
    common = [word for word, count in vocabulary.items() if count >= 20]
    rules = [majority_on_train(lambda answer, word=word: word in words(answer)) for word in common]
    assert max(accuracy(rule) for rule in rules) <= 0.75
    assert accuracy(lambda answer: "!" in answer) == 0.5


def test_model_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    allowed = {".safetensors", ".json", ".jinja", ".md"}
    assert {path.suffix for path in files} <= allowed
    assert not any(
        "_name_or_path" in path.read_text(encoding="utf-8") for path in MODEL.glob("*config.json")
    )


def test_chat_template_yields_one_bos_and_one_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": TRAIN[0].prompt},
    ]
    turns = [*prompt, {"role": "assistant", "content": TRAIN[0].chosen}]
    asked = render(tokenizer, prompt, add_generation_prompt=True)
    ids = render(tokenizer, turns)
    assert ids[: len(asked)] == asked
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    specials = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(specials) == 3
    assert tokenizer.bos_token_id not in tokenizer("plain text")["input_ids"]


def test_model_script_writes_a_loadable_model(tmp_path: Path) -> None:
    run_script("make_demo_model.py", "--steps", "3", "--out", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@torch.no_grad()
def mean_logp(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, pair: Pair
) -> list[float]:
    """Mean log-probability per token of the chosen and of the rejected answer."""
    scores = []
    for answer in (pair.chosen, pair.rejected):
        user = {"role": "user", "content": pair.prompt}
        asked = render(tokenizer, [user], add_generation_prompt=True)
        ids = render(tokenizer, [user, {"role": "assistant", "content": answer}])
        labels = [-100] * len(asked) + ids[len(asked) :]
        scores.append(-model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item())
    return scores


def test_base_model_has_no_preference_yet(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    scores = [mean_logp(model, tokenizer, pair) for pair in HELD_OUT]
    prefers_chosen = sum(chosen > rejected for chosen, rejected in scores) / len(scores)
    assert 0.35 <= prefers_chosen <= 0.65
