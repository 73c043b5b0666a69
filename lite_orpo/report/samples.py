"""Answers to held-out prompts, by the base model and by the trained one.

With an adapter both come from the same model, the adapter switched off and on; no second model
is loaded. Greedy decoding, so that a difference is the training's and not the dice's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..data.rows import parse_row
from ..data.sources import RowSource
from ..errors import RowProblem


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


@torch.no_grad()
def answer(model: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """Greedy answers of the model as it stands, one a sample."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = []
    for sample in samples:
        prompt = torch.tensor([sample.token_ids], device=device)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    model.train(was_training)
    return answers


def _last_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value[-1]["content"]).strip()
