"""A conversation as the model's prompt, token for token as training would write it."""

from collections.abc import Sequence
from typing import NamedTuple

from ..data.preference_row import PreferenceRow
from ..data.tokens.special_text import Tokenizer
from ..data.tokens.tokenization import tokenize_pair
from ..errors import DataError, RowProblem

Messages = Sequence[dict[str, str]]
"""`role` (system, user, assistant) and `content`; the last one is a user's."""


class Prompt(NamedTuple):
    """Tokens to answer to."""

    token_ids: list[int]
    dropped_turns: int
    """Oldest turns (a question and its answer) that were left out for want of positions."""


def prompt_of(
    tokenizer: Tokenizer, messages: Messages, *, positions: int | None, room: int
) -> Prompt:
    """The prompt of a conversation, without its oldest turns where they do not fit.

    Without a chat template the texts follow each other, a line each; a system message comes
    first. Special tokens in somebody's words stay text, as in training.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation.
        positions: how many tokens the model can hold; None: any number.
        room: positions to leave for the answer.

    Raises:
        DataError: the last turn alone does not fit, or the chat template refuses the conversation.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    dropped = 0
    while True:
        ids = _token_ids(tokenizer, [*system, *turns])
        if positions is None or len(ids) + room <= positions:
            return Prompt(ids, dropped)
        if len(turns) <= 2:
            raise DataError(
                f"a prompt of {len(ids)} tokens and {room} for the answer do not fit into the "
                f"model's {positions} positions; ask for less, or lower max-new-tokens"
            )
        del turns[:2]
        dropped += 1


def _token_ids(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    # What training makes of a row's prompt depends on how answers follow it, so it gets two.
    if tokenizer.chat_template:
        first, second = ([{"role": "assistant", "content": text}] for text in ("a", "b"))
        row = PreferenceRow(list(messages), [*first], [*second])
    else:
        row = PreferenceRow("\n".join(message["content"] for message in messages), "a", "b")
    try:
        return tokenize_pair(row, tokenizer).prompt
    except RowProblem as problem:
        raise DataError(f"the prompt {problem.problem}") from None
