"""Tokens at which an answer ends: the tokenizer's, the model's, and the chat template's."""

from typing import Any

from ..data.tokens.special_text import SpecialTokens, Tokenizer

_ANSWER = "Everything is well"


def end_token_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """All tokens that end an answer, each once.

    The tokenizer's EOS, those of the model's generation configuration, and the special token that
    the chat template writes behind an assistant's turn, such as Gemma's <end_of_turn>.
    """
    found: list[int] = []
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found += [of_model] if isinstance(of_model, int) else list(of_model or [])
    turn_end = _turn_end(tokenizer)
    found += [] if turn_end is None else [turn_end]
    return list(dict.fromkeys(found))


def _turn_end(tokenizer: Tokenizer) -> int | None:
    if not tokenizer.chat_template:
        return None
    messages = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program; whether it can be used is told by the prompts
        return None
    _, answer, rest = text.rpartition(_ANSWER)
    special = SpecialTokens(tokenizer)
    match = special.pattern.match(rest.lstrip())
    if not answer or match is None:
        return None
    token = special.ids.get(match.group())
    return token if token in special.ending_ids else None
