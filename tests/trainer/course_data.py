"""A base model in a folder, and preference data in the shapes of the course's hub data sets."""

from pathlib import Path

import datasets
from tiny_models import tiny_model
from tiny_tokenizer import char_tokenizer

_TOPICS = ["rain", "tea", "an oak", "seven", "a red cat", "blue ice"]


def base_model(folder: Path) -> str:
    """A model without a chat template whose tokenizer has ChatML's markers, as SmolLM2's has."""
    tiny_model().save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def _splits(rows, **held_out) -> datasets.DatasetDict:
    sets = {"train": rows[:8], **{name: rows[8:] for name in held_out}}
    return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in sets.items()})


def _answers(i: int) -> tuple[str, str, str]:
    topic = _TOPICS[i % 6]
    return f"Tell me of {topic}, {i}", f"{topic} is good {i}.", f"No{'!' * (i % 4)} {i}"


def hh_rlhf() -> datasets.DatasetDict:
    """Anthropic/hh-rlhf: two transcripts, no prompt; splits train and test."""
    rows = []
    for i in range(12):
        asked, good, bad = _answers(i)
        opening = f"\n\nHuman: {asked}\n\nAssistant:"
        rows.append({"chosen": f"{opening} {good}", "rejected": f"{opening} {bad}"})
    return _splits(rows, test=True)


def _messages(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def ultrafeedback() -> datasets.DatasetDict:
    """trl-lib/ultrafeedback_binarized: messages with the prompt in them, and scores."""
    rows = []
    for i in range(12):
        asked, good, bad = _answers(i)
        rows.append(
            {
                "chosen": _messages(asked, good),
                "rejected": _messages(asked, bad),
                "score_chosen": 8.0,
                "score_rejected": 5.5,
            }
        )
    return _splits(rows, test=True)


def orpo_dpo_mix() -> datasets.DatasetDict:
    """mlabonne/orpo-dpo-mix-40k: messages, and the prompt as text beside them, twice."""
    rows = []
    for i in range(12):
        asked, good, bad = _answers(i)
        rows.append(
            {
                "source": "Airoboros",
                "chosen": _messages(asked, good),
                "rejected": _messages(asked, bad),
                "prompt": asked,
                "question": asked,
            }
        )
    return _splits(rows)
