"""Attention over packed rows: every path equals a dense oracle, and nothing leaks."""

import math
import sys
import types

import pytest
import torch
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from lite_orpo.model import tree_attention
from lite_orpo.model.tree_attention import (
    attention_of_trees,
    refuse_varlen,
    tree_sdpa_attention,
    tree_varlen_attention,
)
from lite_orpo.model.tree_segments import MAX_PADDING_RATIO, buckets_of, tokens_of

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8
# (start, prompt, branches): ordinary pairs, shortest ones, three branches.
LAYOUTS = {
    "two pairs": ((0, 5, (4, 6)), (15, 3, (7, 2))),
    "P=1": ((0, 1, (3, 2)),),
    "C=1": ((0, 4, (1, 3)),),
    "R=1": ((0, 4, (3, 1)),),
    "all 1": ((0, 1, (1, 1)),),
    "unlike lengths": ((0, 30, (9, 4)), (43, 2, (3, 1)), (49, 2, (2, 2))),
    "three branches": ((0, 4, (3, 5, 2)),),
}
layouts = pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
windows = pytest.mark.parametrize("window", [None, 1, 4, 100])


def layer(kind="llama", sinks=None):
    """A module of a transformers file, so that its eager attention is found."""
    homes = {"llama": modeling_llama, "gemma2": modeling_gemma2, "gpt_oss": modeling_gpt_oss}
    made = types.new_class("Layer", (nn.Module,))
    made.__module__ = homes[kind].__name__
    module = made()
    module.num_key_value_groups = HEADS // KV_HEADS
    module.is_causal = True
    module.sinks = sinks
    module.head_dim = HEAD_SIZE
    return module.eval()


def row_of(spans, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = tokens_of(spans)
    return tuple(
        torch.randn(1, heads, length, HEAD_SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def visible(spans, window):
    """Dense bool [T, T], written down from the rule alone."""
    length = tokens_of(spans)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for start, prompt, branches in spans:
        begin = start + prompt
        for branch in branches:
            sequence = [*range(start, start + prompt), *range(begin, begin + branch)]
            for at, query in enumerate(sequence):
                for back, key in enumerate(sequence[: at + 1]):
                    seen[query, key] = window is None or at - back < window
            begin += branch
    return seen


def oracle(query, key, value, seen, softcap=None, sinks=None, scaling=None):
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (scaling or 1 / math.sqrt(HEAD_SIZE))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(1, HEADS, logits.shape[2], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights @ value).transpose(1, 2)


def with_gradients(attend, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def check(attend, tensors, seen, tolerance=1e-10, **how):
    out, gradients = with_gradients(attend, tensors)
    expected, expected_gradients = with_gradients(lambda *qkv: oracle(*qkv, seen, **how), tensors)
    # In fp64 throughout, sums of at most 60 terms of size 1.
    close = {"rtol": tolerance, "atol": tolerance / 10}
    torch.testing.assert_close(out, expected, **close)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


# Eager attention takes its softmax in fp32.
EAGER = 1e-5


def in_buckets(module, q, k, v, spans, window):
    return tree_attention._in_buckets(
        module, q, k, v, spans, window, tree_attention._stock_sdpa, {}
    )[0]


@layouts
@windows
def test_pair_by_pair_equals_the_dense_oracle(spans, window):
    module = layer()
    check(
        lambda q, k, v: tree_sdpa_attention(
            module, q, k, v, None, tree_spans=spans, sliding_window=window
        )[0],
        row_of(spans),
        visible(spans, window),
    )


@layouts
@windows
def test_buckets_of_copied_out_sequences_equal_the_dense_oracle(spans, window):
    module = layer()
    check(
        lambda q, k, v: in_buckets(module, q, k, v, spans, window),
        row_of(spans),
        visible(spans, window),
    )


@layouts
@windows
def test_soft_capped_attention_equals_the_dense_oracle(spans, window):
    module = layer("gemma2")
    check(
        lambda q, k, v: tree_sdpa_attention(
            module, q, k, v, None, tree_spans=spans, sliding_window=window, softcap=1.5, scaling=0.3
        )[0],
        row_of(spans),
        visible(spans, window),
        EAGER,
        softcap=1.5,
        scaling=0.3,
    )


@layouts
@windows
def test_attention_with_sinks_equals_the_dense_oracle(spans, window):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    module = layer("gpt_oss", sinks)
    check(
        lambda q, k, v: tree_sdpa_attention(
            module,
            q,
            k,
            v,
            None,
            tree_spans=spans,
            sliding_window=window,
            s_aux=sinks,
            scaling=0.3,
        )[0],
        row_of(spans),
        visible(spans, window),
        EAGER,
        sinks=sinks,
        scaling=0.3,
    )


def varlen_in_pytorch(
    query, key, value, query_bounds, key_bounds, longest_query, longest_key, *, scale, window_size,
    enable_gqa,
):  # fmt: skip
    """What torch documents of `varlen_attn`: segments, aligned at their last key, window (W, 0)."""
    assert enable_gqa
    left, right = window_size
    out = []
    for n in range(len(query_bounds) - 1):
        q = query[query_bounds[n] : query_bounds[n + 1]]
        k, v = (x[key_bounds[n] : key_bounds[n + 1]] for x in (key, value))
        assert len(q) <= longest_query
        assert len(k) <= longest_key
        own = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        other = torch.arange(len(k))
        seen = other <= own + right
        if left >= 0:
            seen &= other >= own - left
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out.append(oracle(q, k, v, seen, scaling=scale)[0])
    return torch.cat(out)


@layouts
@windows
def test_varlen_segments_equal_the_dense_oracle(spans, window, monkeypatch):
    monkeypatch.setattr(tree_attention, "_varlen_attn", lambda: varlen_in_pytorch)
    module = layer()
    check(
        lambda q, k, v: tree_varlen_attention(
            module, q, k, v, None, tree_spans=spans, sliding_window=window
        )[0],
        row_of(spans),
        visible(spans, window),
    )


@pytest.mark.parametrize("path", ["pair by pair", "in buckets", "eager"])
@pytest.mark.parametrize(
    ("changed", "kept"),
    [("chosen", "rejected"), ("rejected", "chosen"), ("second pair", "first pair"),
     ("first pair", "second pair")],
)  # fmt: skip
def test_nothing_leaks_between_branches_or_pairs(path, changed, kept):
    spans = LAYOUTS["two pairs"]
    places = {
        "chosen": slice(5, 9),
        "rejected": slice(9, 15),
        "first pair": slice(0, 15),
        "second pair": slice(15, 27),
    }
    module = layer("gemma2")
    softcap = {"softcap": 50.0} if path == "eager" else {}

    def attend(q, k, v):
        if path == "in buckets":
            return in_buckets(module, q, k, v, spans, None)
        return tree_sdpa_attention(module, q, k, v, None, tree_spans=spans, **softcap)[0]

    before = row_of(spans)
    after = tuple(x.clone() for x in before)
    for x in after:
        x[:, :, places[changed]] = 9.0
    # Bitwise: a leak through a mask of large numbers is small, and still a leak.
    assert torch.equal(attend(*before)[:, places[kept]], attend(*after)[:, places[kept]])
    assert not torch.equal(attend(*before), attend(*after))


def test_a_missing_layout_raises():
    spans = LAYOUTS["P=1"]
    for attend in (tree_sdpa_attention, tree_varlen_attention):
        with pytest.raises(RuntimeError, match="without their layout"):
            attend(layer(), *row_of(spans), None)


def test_a_layout_of_another_row_raises():
    with pytest.raises(RuntimeError, match="describes one row of 6 tokens"):
        tree_sdpa_attention(layer(), *row_of(LAYOUTS["C=1"]), None, tree_spans=LAYOUTS["P=1"])


def test_a_mask_or_a_bias_by_position_raises():
    spans = LAYOUTS["P=1"]
    with pytest.raises(RuntimeError, match="no attention mask"):
        tree_sdpa_attention(layer(), *row_of(spans), torch.ones(6, 6), tree_spans=spans)
    with pytest.raises(NotImplementedError, match="bias"):
        tree_sdpa_attention(
            layer(), *row_of(spans), None, tree_spans=spans, position_bias=torch.ones(6, 6)
        )


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "dropout"])
def test_varlen_refuses_what_it_does_not_know(extra):
    spans = LAYOUTS["P=1"]
    with pytest.raises(NotImplementedError, match=extra):
        tree_varlen_attention(layer(), *row_of(spans), None, tree_spans=spans, **{extra: 0.5})


def test_varlen_says_where_it_cannot_run(monkeypatch):
    assert "needs a CUDA device" in refuse_varlen(torch.device("cpu"), torch.bfloat16)
    assert "bf16 or fp16" in refuse_varlen(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(tree_attention, "_varlen_attn", lambda: lambda query, key: None)
    assert "2.12 or newer" in refuse_varlen(torch.device("cuda"), torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert "no torch.nn.attention.varlen" in refuse_varlen(torch.device("cuda"), torch.bfloat16)


@layouts
def test_buckets_pad_no_sequence_by_more_than_half(spans):
    plan = buckets_of(spans, None, torch.device("cpu"))
    length = sum(index.numel() for index in plan.indexes)
    true = sum(prompt + branch for _, prompt, branches in spans for branch in branches)
    assert true <= length <= MAX_PADDING_RATIO * true
    assert plan.back.shape == (tokens_of(spans),)
    assert plan.back.unique().numel() == tokens_of(spans)


def test_the_models_own_attention_comes_back_after_an_error():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    own = model.config._attn_implementation
    with pytest.raises(KeyError), attention_of_trees(model, "eager"):
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
        raise KeyError
    assert model.config._attn_implementation == own
