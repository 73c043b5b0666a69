"""One preference row as token ids: prompt, chosen, rejected, tokenised apart.

Tokenised apart, the prompt is an exact prefix of both sequences by construction. One BOS
begins the prompt where the tokenizer has one, one EOS ends each completion. Which rows are too
long, and what then, is decided in `preparation.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from ..errors import DataError, RowProblem
from .rows import PreferenceRow

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which is untyped


class TokenizedPair(NamedTuple):
    """Token ids of one pair; each completion follows the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class _Texts(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def tokenize_pair(row: PreferenceRow, tokenizer: Tokenizer) -> TokenizedPair:
    """Apply the chat template where there are messages, and tokenise.

    Args:
        row: a checked row.
        tokenizer: a transformers tokenizer.

    Returns:
        Token ids with one BOS (if the tokenizer has one) and one EOS per completion.

    Raises:
        DataError: messages, but the tokenizer has no chat template.
        RowProblem: the chat template refuses the row, or leaves a completion empty.
    """
    texts = _chat_texts(row, tokenizer) if row.is_conversational else _plain_texts(row)
    prompt = _ids(tokenizer, texts.prompt)
    bos = tokenizer.bos_token_id
    if bos is not None and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    while bos is not None and prompt[1:2] == [bos]:
        del prompt[0]
    if not prompt:
        raise RowProblem("prompt", "is empty and the tokenizer has no BOS to begin with")
    return TokenizedPair(
        prompt,
        _completion_ids(tokenizer, texts.chosen, "chosen"),
        _completion_ids(tokenizer, texts.rejected, "rejected"),
    )


def _plain_texts(row: PreferenceRow) -> _Texts:
    return _Texts(str(row.prompt), str(row.chosen), str(row.rejected))


def special_texts_in(row: PreferenceRow, tokenizer: Tokenizer) -> list[str]:
    """Special tokens that stand as text in the row's own content, and would be read as such."""
    contents: list[str] = []
    for value in (row.prompt, row.chosen, row.rejected):
        if isinstance(value, str):
            contents.append(value)
        else:
            contents.extend(message["content"] for message in value)
    return [
        token for token in tokenizer.all_special_tokens if any(token in text for text in contents)
    ]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: over-long rows are our business, counted and shown, not a warning each.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _completion_ids(tokenizer: Tokenizer, text: str, column: str) -> list[int]:
    ids = _ids(tokenizer, text)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no EOS token, so a completion has no end; set tokenizer.eos_token"
        )
    if eos in ids:
        # Templates such as ChatML put a line break behind the EOS; it is never generated.
        last = len(ids) - 1 - ids[::-1].index(eos)
        if not tokenizer.decode(ids[last + 1 :]).strip():
            ids = ids[: last + 1]
    while ids[-2:] == [eos, eos]:
        del ids[-1]
    if ids[-1:] != [eos]:
        ids.append(eos)
    if len(ids) < 2:
        raise RowProblem(column, "has no token left beside the EOS")
    return ids


def _chat_texts(row: PreferenceRow, tokenizer: Tokenizer) -> _Texts:
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the tokenizer has no chat template; set "
            "chat_template_path (in Python: tokenizer.chat_template), or use plain text rows"
        )
    prompt_messages: Any = row.prompt
    ends_in_assistant = prompt_messages[-1]["role"] == "assistant"
    prompt = _render(
        tokenizer,
        prompt_messages,
        "prompt",
        add_generation_prompt=not ends_in_assistant,
        continue_final_message=ends_in_assistant,
    )
    full: Mapping[str, str] = {
        column: _render(tokenizer, prompt_messages + messages, column)
        for column, messages in (("chosen", row.chosen), ("rejected", row.rejected))
    }
    # Some templates write the generation prompt differently once the answer is there (an empty
    # thinking block, say): the prompt ends where all three renderings still agree.
    shared = _common_prefix_length(prompt, full["chosen"], full["rejected"])
    if shared == 0:
        raise RowProblem("prompt", "is changed from its first character on by the chat template")
    for column, text in full.items():
        if _splits_special_token(text, shared, tokenizer):
            raise RowProblem(
                column,
                "is written by the chat template in a way that leaves no border between prompt "
                "and answer",
            )
    return _Texts(prompt[:shared], full["chosen"][shared:], full["rejected"][shared:])


def _splits_special_token(text: str, border: int, tokenizer: Tokenizer) -> bool:
    for token in tokenizer.all_special_tokens:
        start = text.find(token, max(0, border - len(token) + 1))
        if 0 <= start < border:
            return True
    return False


def _common_prefix_length(prompt: str, chosen: str, rejected: str) -> int:
    for length, characters in enumerate(zip(prompt, chosen, rejected, strict=False)):
        if len(set(characters)) > 1:
            return length
    return min(len(prompt), len(chosen), len(rejected))


def _render(tokenizer: Tokenizer, messages: Any, column: str, **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no valid Jinja, line {error.lineno}: {error.message}"
        ) from None
    except TemplateError as error:
        raise RowProblem(column, f"is refused by the chat template: {error}") from None
