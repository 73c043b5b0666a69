"""One model's side of a conversation: what was said, what still fits, and the next answer."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import DataError
from .answering import Answerer, Question, seed_of
from .prompts import prompt_of
from .streaming import WordStreamer


class Reply(NamedTuple):
    """An answer, and what happened on the way."""

    text: str
    dropped_turns: int
    """Oldest turns that the model did not see."""
    was_stopped: bool
    """By Ctrl-C; the text is what there was by then."""


class Conversation:
    """What was said with one model.

    Args:
        answerer: the model.
        tokenizer: its tokenizer.
        system: system message; None: none.
        max_new_tokens: length of an answer.
        temperature: 0 for greedy.
        seed: of the draws.
    """

    def __init__(
        self,
        answerer: Answerer,
        tokenizer: Any,
        *,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._answerer = answerer
        self._tokenizer = tokenizer
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._temperature = temperature
        self._seed = seed
        positions = answerer.positions
        self._max_new_tokens = (
            max_new_tokens if positions is None else min(max_new_tokens, positions // 2)
        )

    def begin_anew(self, system: str | None) -> None:
        """Forget what was said."""
        self._turns = []
        self._system = system

    def reply(self, text: str, tell: Callable[[str], None]) -> Reply:
        """Answer, and remember both; Ctrl-C ends the answer.

        Args:
            text: what the user says.
            tell: is called with each piece of the answer.

        Raises:
            DataError: the text alone is too long, or the chat template refuses it; nothing is
                remembered then.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        prompt = prompt_of(
            self._tokenizer,
            [*system, *turns],
            positions=self._answerer.positions,
            room=max(1, self._max_new_tokens // 2),
        )
        del turns[: 2 * prompt.dropped_turns]
        seed = seed_of(self._seed, text, len(self._turns))
        question = Question(prompt.token_ids, self._max_new_tokens, self._temperature, seed)
        streamer = WordStreamer(self._tokenizer, tell)
        was_stopped = False
        try:
            self._answerer.token_ids([question], streamer)
        except KeyboardInterrupt:
            was_stopped = True
            streamer.end()
        answer = streamer.text.strip()
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return Reply(answer, prompt.dropped_turns, was_stopped)


def check_system(tokenizer: Any, system: str | None) -> None:
    """Refuse a system message that the chat template does not take.

    Raises:
        DataError: that.
    """
    if system is None:
        return
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    try:
        prompt_of(tokenizer, messages, positions=None, room=0)
    except DataError as error:
        raise DataError(f"this model takes no system message: {error}") from None
