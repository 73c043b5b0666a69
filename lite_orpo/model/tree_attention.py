"""Attention over packed rows: a branch sees its own pair's prompt and itself, nothing else.

Registered with transformers' attention interface under names of our own, so that the model
builds no mask, and window, soft-cap and sinks of each layer arrive as arguments. The layout
comes with every call as `tree_spans`, because activation checkpointing calls again in the
backward pass, where nothing but the arguments is left. A call without it raises: a stock mask on
packed rows would train silently wrong.

Inside, [prompt | branch] is ordinary causal attention, and transformers' own functions compute
it; only which rows go together is ours:

- CPU: two calls of SDPA per pair, [prompt | first branch], then the other branches' queries.
- other devices: rows are copied out to right-padded sequences, pairs of similar length together,
  so that few large calls take the place of many small ones.
- soft-cap or sinks: the model's own eager attention on such sequences.

Legend: T tokens of the row, H heads, Dh head size, n sequences of L tokens in a bucket.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .tree_segments import (
    Span,
    buckets_of,
    causal_band,
    pair_masks,
    tokens_of,
    varlen_segments,
)

Attended = tuple[Tensor, None]

TREE_SDPA = "lite_orpo_tree_sdpa"
TREE_VARLEN = "lite_orpo_tree_varlen"
ATTENTION_NAMES = {"sdpa": TREE_SDPA, "varlen": TREE_VARLEN}


def tree_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_spans: tuple[Span, ...] | None = None,
    **kwargs: Any,
) -> Attended:
    """Attend over one packed row.

    Args:
        module: the attention layer.
        query: [1, H, T, Dh].
        key: [1, Hkv, T, Dh].
        value: [1, Hkv, T, Dh].
        attention_mask: must be None.
        tree_spans: the row's layout.
        kwargs: what the model hands to any attention function: scaling, dropout, sliding_window,
            softcap, s_aux.

    Returns:
        [1, T, H, Dh], and None for the attention weights.

    Raises:
        RuntimeError: there is no layout, or it does not describe this row.
        NotImplementedError: the layer wants something that is not known here.
    """
    spans = _checked(module, query, attention_mask, tree_spans, kwargs)
    window = kwargs.pop("sliding_window", None)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return _in_buckets(module, query, key, value, spans, window, _eager_of(module), kwargs)
    if query.device.type == "cpu":
        return _pair_by_pair(module, query, key, value, spans, window, kwargs)
    return _in_buckets(module, query, key, value, spans, window, _stock_sdpa, kwargs)


def tree_varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_spans: tuple[Span, ...] | None = None,
    **kwargs: Any,
) -> Attended:
    """Attend over one packed row in a single call of torch's variable-length attention (CUDA).

    Arguments, result and errors as in `tree_sdpa_attention`; bf16 or fp16 only, no soft-cap, no
    sinks. Not measured on a GPU yet.
    """
    spans = _checked(module, query, attention_mask, tree_spans, kwargs)
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"varlen attention knows no {name}")
    if kwargs.get("dropout"):
        raise NotImplementedError("varlen attention knows no dropout")
    plan = varlen_segments(spans, query.device)
    window = kwargs.get("sliding_window")
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    attended = _varlen_attn()(
        queries,
        keys.index_select(0, plan.key_index),
        values.index_select(0, plan.key_index),
        plan.query_bounds,
        plan.key_bounds,
        plan.longest_query,
        plan.longest_key,
        scale=kwargs.get("scaling"),
        # Keys to the left of the query's own, which aligns with the last key of its segment.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unsqueeze(0), None


def refuse_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why varlen attention cannot run here, or None where it can."""
    try:
        known = set(inspect.signature(_varlen_attn()).parameters)
    except ImportError:
        return "this torch has no torch.nn.attention.varlen (2.12 or newer has what is needed)"
    if not {"window_size", "enable_gqa", "scale"} <= known:
        return "this torch's varlen_attn has no window_size or enable_gqa; 2.12 or newer has them"
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, the model in {str(dtype).removeprefix('torch.')}"
    return None


@contextmanager
def attention_of_trees(causal_lm: Any, name: str) -> Iterator[None]:
    """Let a model attend over packed rows within this context, and as before outside it.

    The backward pass belongs inside too: activation checkpointing looks the function up again.

    Args:
        causal_lm: a transformers model.
        name: `TREE_SDPA` or `TREE_VARLEN`.
    """
    configs = _attention_configs(causal_lm)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def _attention_configs(causal_lm: Any) -> list[Any]:
    """Every configuration that the model's modules look their attention function up in."""
    found = {}
    for module in causal_lm.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def register_tree_attention() -> None:
    """Make our attention functions known to transformers; a second call changes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(TREE_SDPA, tree_sdpa_attention)
    ALL_ATTENTION_FUNCTIONS.register(TREE_VARLEN, tree_varlen_attention)


def _checked(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    tree_spans: tuple[Span, ...] | None,
    kwargs: dict[str, Any],
) -> tuple[Span, ...]:
    if tree_spans is None:
        raise RuntimeError(
            "attention of packed rows was called without their layout (tree_spans): on its way "
            "through the model it was lost, or another input came in while packed rows are trained"
        )
    if query.shape[0] != 1 or query.shape[2] != tokens_of(tree_spans):
        raise RuntimeError(
            f"the layout describes one row of {tokens_of(tree_spans)} tokens, the input is "
            f"{query.shape[0]} x {query.shape[2]}"
        )
    if attention_mask is not None:
        raise RuntimeError("packed rows have no padding and take no attention mask")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention is not causal")
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("an attention bias by position is not known for packed rows")
    return tree_spans


def _stock_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kwargs["is_causal"] = True  # which it overrules where there is a mask
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The eager attention of the model's own file, which knows its soft-cap and sinks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no eager attention to call")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if mask is None:
            mask = causal_band(query.shape[2], key.shape[2], None, query.device)
        lowest = torch.finfo(query.dtype).min
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
        return eager(module, query, key, value, additive, **kwargs)

    return attend


def _pair_by_pair(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[Span, ...],
    window: int | None,
    kwargs: dict[str, Any],
) -> Attended:
    masks = pair_masks(spans, window, query.device)
    out = []
    for number, (start, prompt, branches) in enumerate(spans):
        trunk_end = start + prompt + branches[0]
        queries, keys, values = (x[:, :, start:trunk_end] for x in (query, key, value))
        out.append(_stock_sdpa(module, queries, keys, values, masks[number][0], **kwargs)[0])
        begin = trunk_end
        for branch, mask in zip(branches[1:], masks[number][1:], strict=True):
            end = begin + branch
            keys, values = (
                torch.cat((x[:, :, start : start + prompt], x[:, :, begin:end]), 2)
                for x in (key, value)
            )
            queries = query[:, :, begin:end]
            out.append(_stock_sdpa(module, queries, keys, values, mask, **kwargs)[0])
            begin = end
    return torch.cat(out, 1), None


def _in_buckets(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[Span, ...],
    window: int | None,
    attend: Callable[..., tuple[Tensor, Any]],
    kwargs: dict[str, Any],
) -> Attended:
    plan = buckets_of(spans, window, query.device)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, Dh]
    out = []
    for index, mask in zip(plan.indexes, plan.masks, strict=True):
        sequences = (
            x.index_select(0, index.view(-1)).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x in rows
        )
        attended, _ = attend(module, *sequences, mask, **kwargs)  # [n, L, H, Dh]
        out.append(attended.flatten(0, 1))
    return torch.cat(out).index_select(0, plan.back).unsqueeze(0), None


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
