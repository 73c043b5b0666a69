"""setup_chat_format: ChatML for a base model, without a new row in the embedding.

TRL's former function added <|im_start|> and <|im_end|> and grew the embedding, which then has to
be trained and saved whole: the adapter swells, and llama.cpp refuses it. Here tokens that are
there are used (SmolLM2 and Qwen have them), and otherwise the markers are ordinary text.
"""

import logging
from typing import Any

from .errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

START, END = "<|im_start|>", "<|im_end|>"


def setup_chat_format(
    model: Any, tokenizer: Any, format: str | None = "chatml", resize_to_multiple_of: Any = None
) -> tuple[Any, Any]:
    """Give a tokenizer without a chat template ChatML, and let the model stop at its end of turn.

    Where <|im_start|> and <|im_end|> are single tokens of the tokenizer, turns are written with
    them and <|im_end|> becomes the EOS. Elsewhere the markers are spelled in ordinary tokens and
    a turn ends with the model's own EOS. A BOS that the tokenizer has begins the conversation. A
    template that is there already stays: the model was trained with it.

    Args:
        model: a transformers CausalLM, or one that PEFT has wrapped; its EOS ids are changed.
        tokenizer: its tokenizer, changed in place.
        format: "chatml".
        resize_to_multiple_of: has no effect: no token is added, so nothing is resized.

    Returns:
        The same model and the same tokenizer.

    Raises:
        ConfigError: another format.
        ModelError: no EOS to end a turn with, or a marker that the model has no embedding for.
    """
    if format != "chatml":
        raise ConfigError(f"format must be 'chatml', found {format!r}; or set your own template: "
                          "tokenizer.chat_template = '...'")  # fmt: skip
    if tokenizer.chat_template:
        logger.warning(
            "the tokenizer has a chat template, which is kept: the model was trained with it; for "
            "ChatML, set tokenizer.chat_template = None before setup_chat_format"
        )
        return model, tokenizer
    if resize_to_multiple_of is not None:
        logger.warning("resize_to_multiple_of has no effect: no token is added to the vocabulary")
    if _is_one_token(tokenizer, START) and _is_one_token(tokenizer, END):
        _end_turns_with_marker(model, tokenizer)
        end = END
    else:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no EOS to end a turn with; set tokenizer.eos_token")
        logger.warning(
            "%s and %s are no tokens of this model: they are written as text, and a turn ends "
            "with %s",
            START,
            END,
            tokenizer.eos_token,
        )
        end = tokenizer.eos_token
    tokenizer.chat_template = _template(tokenizer, end)
    return model, tokenizer


def _template(tokenizer: Any, end: str) -> str:
    # The trainer begins every prompt with the BOS; what is asked later must begin alike.
    bos = "{{ bos_token }}" if tokenizer.bos_token not in (None, START) else ""
    end_of_turn = f"'{END}'" if end == END else "eos_token"
    return (
        bos
        + "{% for message in messages %}"
        + f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] }}}}"
        + f"{{{{ {end_of_turn} + '\\n' }}}}"
        + "{% endfor %}{% if add_generation_prompt %}"
        + f"{{{{ '{START}assistant\\n' }}}}"
        + "{% endif %}"
    )


def _is_one_token(tokenizer: Any, text: str) -> bool:
    # Among the tokens, not alone: some tokenizers put a space in front of any text.
    token_id = tokenizer.get_vocab().get(text)
    return token_id is not None and token_id in tokenizer.encode(text, add_special_tokens=False)


def _end_turns_with_marker(model: Any, tokenizer: Any) -> None:
    start_id, end_id = tokenizer.convert_tokens_to_ids([START, END])
    rows = model.get_input_embeddings().weight.shape[0]
    if max(start_id, end_id) >= rows:
        raise ModelError(
            f"{START} and {END} are tokens {start_id} and {end_id} of the tokenizer, but the model "
            f"embeds {rows} tokens; use the model's own tokenizer"
        )
    former = tokenizer.eos_token
    if tokenizer.pad_token is None and former is not None:
        tokenizer.pad_token = former  # another than the EOS, which generation must not mask
    if not {START, END} <= set(tokenizer.all_special_tokens):
        # Marked as control tokens, so that in somebody's words they are spelled out.
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [START, END]}, replace_extra_special_tokens=False
        )
    tokenizer.eos_token = END
    # A PeftModel hands these on to the model inside.
    model.config.get_text_config().eos_token_id = end_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ids = generation.eos_token_id
        earlier = ids if isinstance(ids, list) else [] if ids is None else [ids]
        generation.eos_token_id = [end_id, *(i for i in earlier if i != end_id)]
