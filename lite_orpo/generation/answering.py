"""Batches of prompts -> answers, the same as one by one; smaller batches where memory runs out.

Rows are padded on the left. A prompt that leaves less room than is asked for is answered alone, so
that no row runs past the model's positions on behalf of another.
"""

import gc
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..allocator_failure import is_out_of_memory
from ..data.tokens.special_text import Tokenizer
from ..errors import OutOfMemory
from .end_tokens import end_token_ids
from .sampling import GumbelNoise

logger = logging.getLogger(__name__)


class Question(NamedTuple):
    """A prompt and how it is to be answered."""

    token_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0


class Answerer:
    """Answers by one model as it stands.

    Args:
        model: a transformers CausalLM or PeftModel, on its device.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._ends = end_token_ids(model, tokenizer)
        self.positions = positions_of(model)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self._ends[0] if self._ends else 0)

    @torch.no_grad()
    def token_ids(self, questions: Sequence[Question], streamer: Any = None) -> list[list[int]]:
        """Tokens of each answer, without the one that ends it.

        Args:
            questions: answered as one batch.
            streamer: a transformers streamer, for one question.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            return self._generate(questions, streamer)
        finally:
            self._model.train(was_training)

    def text(self, token_ids: list[int]) -> str:
        """An answer in words, without special tokens or white space around it."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def texts(self, questions: Sequence[Question]) -> list[str]:
        """Answers of one batch, in words."""
        return [self.text(ids) for ids in self.token_ids(questions)]

    def has_full_room(self, question: Question) -> bool:
        """Whether the model's positions allow as many new tokens as are asked for."""
        return self._room(question) == question.max_new_tokens

    def _room(self, question: Question) -> int:
        if self.positions is None:
            return question.max_new_tokens
        return max(1, min(question.max_new_tokens, self.positions - len(question.token_ids)))

    def _generate(self, questions: Sequence[Question], streamer: Any) -> list[list[int]]:
        from transformers import GenerationConfig

        device = next(self._model.parameters()).device
        width = max(len(question.token_ids) for question in questions)
        ids = torch.full((len(questions), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            ids[row, width - len(question.token_ids) :] = torch.tensor(question.token_ids)
            mask[row, width - len(question.token_ids) :] = 1
        noise = GumbelNoise([q.seed for q in questions], [q.temperature for q in questions])
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            # Nothing is left to the model's own configuration: what is drawn from is its softmax.
            generation_config=GenerationConfig(
                max_new_tokens=max(self._room(question) for question in questions),
                min_length=0,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                eos_token_id=self._ends or None,
                pad_token_id=self._pad,
            ),
            logits_processor=[noise] if any(q.temperature > 0 for q in questions) else None,
            streamer=streamer,
        )
        answers = output[:, width:].tolist()
        return [self._cut(a[: q.max_new_tokens]) for a, q in zip(answers, questions, strict=True)]

    def _cut(self, token_ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(token_ids) if token in self._ends), None)
        return token_ids[:end]


class BatchSize:
    """How many prompts are answered together; halved for good where memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size


def answers_in_batches(
    answerer: Answerer, questions: Sequence[Question], batch_size: BatchSize
) -> Iterator[tuple[list[int], list[str]]]:
    """Answer many questions, those of like length together, the longest first.

    The longest come first so that memory runs out at once or not at all.

    Args:
        answerer: the model.
        questions: any number.
        batch_size: shrinks where memory runs out.

    Yields:
        Numbers of the questions of a batch, and their answers.

    Raises:
        OutOfMemory: not even one fits.
    """
    waiting = sorted(range(len(questions)), key=lambda i: (-len(questions[i].token_ids), i))
    while waiting:
        numbers = _next_batch(answerer, questions, waiting, batch_size.size)
        try:
            texts = answerer.texts([questions[number] for number in numbers])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(numbers) == 1:
                raise OutOfMemory(
                    f"memory ran out over one prompt of {len(questions[numbers[0]].token_ids)} "
                    "tokens; lower --max-new-tokens, or load the model in 4 bits"
                ) from error
            batch_size.size = max(1, len(numbers) // 2)
            logger.warning("memory ran out: %d prompts at a time from here on", batch_size.size)
        else:
            yield numbers, texts
            waiting = [number for number in waiting if number not in set(numbers)]
            continue
        _free()


def _next_batch(
    answerer: Answerer, questions: Sequence[Question], waiting: list[int], size: int
) -> list[int]:
    first = questions[waiting[0]]
    if not answerer.has_full_room(first):
        return waiting[:1]
    # The others are no longer than the first, so they have room too.
    alike = (n for n in waiting[:size] if questions[n].max_new_tokens == first.max_new_tokens)
    return list(alike)


def seed_of(seed: int, *parts: object) -> int:
    """A seed for one answer, the same in every run: from the run's seed and what names it."""
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def positions_of(model: Any) -> int | None:
    """How many tokens the model can hold; None where its configuration does not say."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions else None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
