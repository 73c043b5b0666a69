"""Whether a model may train on packed rows: a static rule, then a probe on the model itself.

The rule refuses what is known to carry state along a row in other ways than attention, or to
depend on the row as a whole. The probe (`prefix_probe.py`) runs the model as it will train,
adapter and quantisation in place.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from . import tree_attention
from .head import innermost_causal_lm
from .prefix_probe import computes_on, why_not_exact
from .tree_attention import ATTENTION_NAMES, attention_of_trees, register_tree_attention

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_CARRIES_STATE = re.compile(
    r"Mamba|DeltaNet|Rwkv|RWKV|Recurrent|ShortConv|SSM|Retention|Griffin|LinearAttention"
    r"|LightningAttention|Indexer|Compress"
)
# Adapters that change each position on its own. Others may read the row as a whole.
_ADAPTERS_BY_POSITION = {
    "LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "FOURIERFT", "LN_TUNING",
    "TRAINABLE_TOKENS",
}  # fmt: skip


class PrefixSharing(NamedTuple):
    """The decision for one model."""

    is_on: bool
    reason: str
    """Why, in words that end a sentence."""
    attention: str = ""
    """Name of the registered attention function, where sharing is on."""

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """The context in which forward and backward passes over packed rows run."""
        if not self.is_on:
            yield
            return
        with attention_of_trees(innermost_causal_lm(model), self.attention):
            yield


def decide_prefix_sharing(
    model: Any, *, attention: str, max_length: int | None, run_refusals: Sequence[str] = ()
) -> PrefixSharing:
    """Find out whether a model computes the same on packed rows as on separate sequences.

    Args:
        model: the model on its device, adapter in place, scored head attached and verified.
        attention: "sdpa" or "varlen".
        max_length: most tokens of a sequence in training, None if unlimited.
        run_refusals: what in the settings of the run speaks against it.

    Returns:
        The decision. The model's mode and attention are as before.
    """
    causal_lm = innermost_causal_lm(model)
    reasons = [*_static_reasons(model, causal_lm, max_length), *run_refusals]
    if attention == "varlen":
        reasons += _varlen_reasons(causal_lm)
    if reasons:
        return PrefixSharing(False, reasons[0])
    register_tree_attention()
    name = ATTENTION_NAMES[attention]
    was_training = model.training
    model.eval()
    try:
        reason = why_not_exact(model, causal_lm, name)
    finally:
        model.train(was_training)
    if reason is not None:
        return PrefixSharing(False, reason)
    return PrefixSharing(True, "proved exact on this model", name)


def static_refusal(model: Any, max_length: int | None) -> str | None:
    """The first reason of the static rule against packed rows, None where it has none."""
    return next(_static_reasons(model, innermost_causal_lm(model), max_length), None)


def _varlen_reasons(causal_lm: Any) -> Iterator[str]:
    refusal = tree_attention.refuse_varlen(*computes_on(causal_lm))
    if refusal is not None:
        yield f"tree_attention: varlen: {refusal}"
    # The probe runs without dropout and would not see it.
    rates = (getattr(module, "attention_dropout", 0.0) for module in causal_lm.modules())
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        yield "tree_attention: varlen: it knows no dropout on attention; set disable_dropout: true"


def _static_reasons(model: Any, causal_lm: Any, max_length: int | None) -> Iterator[str]:
    """Why the model is known not to fit, the most telling reason first."""
    config = causal_lm.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        yield f"it has layers of type {', '.join(unknown)}"
    mixers = {
        type(module).__name__
        for module in causal_lm.modules()
        if _CARRIES_STATE.search(type(module).__name__) or isinstance(module, nn.Conv1d)
    }
    if mixers:
        yield f"it mixes positions outside attention ({', '.join(sorted(mixers)[:3])})"
    if getattr(config, "alibi", False):
        yield "its position bias (ALiBi) counts tokens of the row"
    if getattr(config, "attention_chunk_size", None):
        yield "it attends in chunks of the row"
    rope = _rope_that_depends_on_length(config, max_length)
    if rope:
        yield f"its {rope} positions depend on the longest sequence beside a pair"
    for adapter in getattr(model, "peft_config", {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind not in _ADAPTERS_BY_POSITION:
            yield f"its adapter of type {kind} may read a row as a whole"
        if getattr(adapter, "alora_invocation_tokens", None):
            yield "its adapter (aLoRA) begins at a token that it looks for once in a row"
    if getattr(causal_lm, "_is_stateful", False):
        yield "it carries a state along the row"
    if not getattr(causal_lm, "_supports_attention_backend", False):
        yield "its attention cannot be exchanged"
    elif not causal_lm._can_set_attn_implementation():
        yield "its attention cannot be set"


def _rope_that_depends_on_length(config: Any, max_length: int | None) -> str | None:
    """The rope type whose angles change beyond a length that training may reach."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    for one in by_layer or [parameters]:
        kind = one.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = (
            one.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or getattr(config, "max_position_embeddings", None)
        )
        if max_length is None or limit is None or max_length > limit:
            return str(kind)
    return None
