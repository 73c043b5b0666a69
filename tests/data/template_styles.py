"""Eight chat template styles, each with a small tokenizer that is built like the real family's.

Every character (or UTF-8 byte) is one token, so that what is seen in a golden is where the control
tokens, the spaces and the line breaks go. The templates are our own, in the families' styles.
"""

import string
from functools import lru_cache
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Style(NamedTuple):
    """A family: how its tokenizer cuts text, its control tokens, and its template."""

    name: str
    core: str  # "bytes", "metaspace" (a space before each piece of text), "spaces" (none added)
    bos: str | None
    eos: str
    others: tuple[str, ...]
    template: str
    allows_system: bool = True
    strips_right: bool = False  # control tokens swallow the white space behind them


CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA2 = """\
{% set ns = namespace(system='') %}
{% for m in messages %}
{% if m['role'] == 'system' %}
{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}
{% elif m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (ns.system + m['content'])|trim + ' [/INST]' }}
{%- set ns.system = '' %}
{% else %}
{{ ' ' + m['content']|trim + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""

LLAMA3 = """\
{{ bos_token }}
{%- for m in messages %}
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']|trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = """\
{{ bos_token }}
{%- set ns = namespace(system='') %}
{% for m in messages %}
{% if m['role'] == 'system' %}
{% set ns.system = m['content'] + '\n\n' %}
{% elif m['role'] == 'user' %}
{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}
{%- set ns.system = '' %}
{% else %}
{{ ' ' + m['content'] + eos_token }}
{%- endif %}
{% endfor %}"""

GEMMA = """\
{{ bos_token }}
{%- for m in messages %}
{% if m['role'] == 'system' %}
{{ raise_exception('there is no system role') }}
{%- endif %}
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\n' + m['content']|trim + '<end_of_turn>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\n' }}
{%- endif %}"""

PHI = """\
{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{%- endif %}"""

ZEPHYR = """\
{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{%- endif %}"""

ALPACA = """\
{% for m in messages %}
{% if m['role'] == 'system' %}
{{ m['content'] + '\n\n' }}
{%- elif m['role'] == 'user' %}
{{ '### Instruction:\n' + m['content'] + '\n\n' }}
{%- else %}
{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\n' }}
{%- endif %}"""

# Beside the eight, for the ChatML tokenizer: what their control tokens are does not matter. The
# first three do harm silently, the fourth looks as if it did.

# Mistral-7B-Instruct-v0.3: the system text goes to the user's turn that is the last of all.
LATE_SYSTEM = """\
{% set system = messages[0]['content'] if messages[0]['role'] == 'system' %}
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m['content'] + '[/INST]' }}
{%- elif m['role'] == 'assistant' %}
{{ ' ' + m['content']|trim + eos_token }}
{%- endif %}
{% endfor %}"""

NO_SYSTEM = """\
{% for m in messages if m['role'] != 'system' %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""

# DeepSeek-R1: thoughts are asked for, and taken out of what was answered.
STRIPPED_THOUGHTS = """\
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n<think>\n' }}
{%- endif %}"""

# Qwen3: thoughts are written anew, with line breaks of the template's own.
REWRITTEN_THOUGHTS = """\
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if '</think>' in m['content'] %}
{% set thoughts = m['content'].split('</think>')[0].split('<think>')[-1].strip() %}
{{ '<think>\n' + thoughts + '\n</think>\n\n' }}
{%- endif %}
{{ m['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}
{%- endif %}"""

STYLES = {
    style.name: style
    for style in (
        Style("chatml", "bytes", None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), CHATML),
        Style("llama2", "metaspace", "<s>", "</s>", (), LLAMA2),
        Style(
            "llama3",
            "bytes",
            "<|begin_of_text|>",
            "<|eot_id|>",
            ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
            LLAMA3,
        ),
        Style("mistral", "metaspace", "<s>", "</s>", (), MISTRAL),
        Style(
            "gemma",
            "spaces",
            "<bos>",
            "<eos>",
            ("<start_of_turn>", "<end_of_turn>"),
            GEMMA,
            allows_system=False,
        ),
        Style(
            "phi",
            "metaspace",
            "<s>",
            "<|endoftext|>",
            ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            PHI,
            strips_right=True,
        ),
        Style("zephyr", "metaspace", "<s>", "</s>", (), ZEPHYR),
        Style("alpaca", "bytes", "<|endoftext|>", "<|endoftext|>", (), ALPACA),
    )
}


@lru_cache
def styled_tokenizer(
    name: str, *, pad_is_eos: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A style's tokenizer, with a pad token of its own or the EOS for it."""
    style = STYLES[name]
    if style.core == "bytes":
        core = _bytes()
    else:
        core = _spaces(add_prefix=style.core == "metaspace")
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=style.strips_right)
            for token in style.others
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token=style.eos if pad_is_eos else "<pad>",
        unk_token=None if style.core == "bytes" else "<unk>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = style.template
    return tokenizer


def _bytes() -> Tokenizer:
    """GPT-2's way: each byte has a letter ("Ġ" is the space, "Ċ" the line break)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _spaces(*, add_prefix: bool) -> Tokenizer:
    """SentencePiece's way: "▁" is the space; what the vocabulary lacks is spelled in bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set(string.printable) - set(string.whitespace))
    vocabulary = {token: i for i, token in enumerate(("<unk>", *fallback, "▁", *letters))}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if add_prefix else spaces
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def shown(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Tokens as text, with each control token in «», so that it is told from its spelling."""
    controls = set(tokenizer.added_tokens_decoder)
    return "".join(
        f"«{token}»" if id in controls else token
        for id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    )
