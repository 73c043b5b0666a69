"""Answers to a few held-out prompts at each evaluation during training, before and by now.

Nothing of the training is touched: decoding is greedy, the random states are put back, and the
time it takes is left out of the throughput.
"""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..model.adapter import adapter_switched_off
from ..step.random_state import RandomState
from .metrics_file import MetricsFile
from .samples import Answered, Sample, answer


class SamplesAtEvaluations(TrainerCallback):
    """Answer, show, and write a line `{"step": .., "samples": [..]}` into metrics.jsonl.

    Args:
        trainer: an `ORPOTrainer`.
        samples: the prompts.
        max_new_tokens: length of an answer.
        base_answers: those of the model before training; empty: it is the model with its adapter
            switched off, and is asked once.
        show: is called with the answers of each evaluation.
        metrics: where they are written; None: nowhere.
    """

    def __init__(
        self,
        trainer: Any,
        samples: list[Sample],
        max_new_tokens: int,
        base_answers: list[str],
        show: Callable[[list[Answered]], None],
        metrics: MetricsFile | None,
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._max_new_tokens = max_new_tokens
        self._before = base_answers
        self._show = show
        self._metrics = metrics
        self._is_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on evaluations are those of the training."""
        self._is_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is evaluated afterwards is shown by whoever asks for it."""
        self._is_training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer each prompt by the model as it stands, on the main process."""
        if not self._is_training or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        random = RandomState.now()
        try:
            answered = self._answers()
        finally:
            random.put_back()
        self._show(answered)
        if self._metrics is not None:
            self._metrics.write(state.global_step, {"samples": [a._asdict() for a in answered]})
        self._trainer.leave_out_of_throughput(time.perf_counter() - started)

    def _answers(self) -> list[Answered]:
        model, tokenizer = self._trainer.model, self._trainer.processing_class
        if not self._before:
            with adapter_switched_off(model):
                self._before = answer(model, tokenizer, self._samples, self._max_new_tokens)
        after = answer(model, tokenizer, self._samples, self._max_new_tokens)
        return [
            Answered(sample.text, old, new)
            for sample, old, new in zip(self._samples, self._before, after, strict=True)
        ]
