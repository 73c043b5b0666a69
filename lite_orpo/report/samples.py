"""Answers to held-out prompts, by the base model and by the trained one.

With an adapter both come from the same model, the adapter switched off and on; no second model
is loaded. Greedy decoding, so that a difference is the training's and not the dice's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..data.files.sources import RowSource
from ..data.formats.rows import parse_row
from ..errors import RowProblem
from ..generation.answering import Answerer, BatchSize, Question, answers_in_batches

_AT_ONCE = 8


class Sample(NamedTuple):
    """One held-out prompt: its text and its tokens."""

    text: str
    token_ids: list[int]


class Answered(NamedTuple):
    """A prompt with the answers before and after training."""

    prompt: str
    before: str
    after: str


def pick_samples(dataset: Any, source: RowSource, count: int) -> list[Sample]:
    """Take prompts spread evenly over a prepared data set.

    Args:
        dataset: from `prepare_pairs`.
        source: the raw rows it was made of, for the prompts as a person wrote them.
        count: how many.

    Returns:
        At most `count` samples.
    """
    count = min(count, len(dataset))
    if count <= 0:
        return []
    records = [dataset[len(dataset) * i // count] for i in range(count)]
    wanted = {record["row"]: record["prompt_input_ids"] for record in records}
    samples = []
    for number, (_, raw) in enumerate(source.read()):
        if number in wanted:
            try:
                row = parse_row(raw)
            except RowProblem:  # the file changed since it was tokenised
                continue
            samples.append(Sample(_last_text(row.prompt), list(wanted.pop(number))))
        if not wanted:
            break
    return samples


def answer(model: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """Greedy answers of the model as it stands, one a sample; no generator is drawn from."""
    questions = [Question(sample.token_ids, max_new_tokens) for sample in samples]
    answers = [""] * len(questions)
    batches = answers_in_batches(Answerer(model, tokenizer), questions, BatchSize(_AT_ONCE))
    for numbers, texts in batches:
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def _last_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value[-1]["content"]).strip()
