"""The bytes that stay from step to step: weights as they are stored, gradients, optimiser."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config.orpo_config import ORPOConfig
from ..model.adapter import base_layer
from ..model.head import innermost_causal_lm
from ..model.meta_twin import MetaTwin, Storage

# bitsandbytes: one scale for 64 weights; nested, a byte each and an fp32 one for 256 of them.
_NF4_BLOCK, _NESTED_BLOCK = 64, 256
# How many values an optimiser keeps for a weight; the first name that is part of its own counts.
_STATES = {
    "adafactor": 0.02,  # a row and a column of each matrix
    "ademamix": 3,
    "grokadamw": 3,
    "adalomo": 0.02,
    "lomo": 0,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
    "adam": 2,
}


class MemoryItem(NamedTuple):
    """One line of the plan."""

    name: str
    size: int
    note: str = ""
    is_on_host: bool = False
    """In the host's memory, where the device is another."""


def on_device(items: Sequence[MemoryItem]) -> int:
    """Bytes of what is not on the host."""
    return sum(item.size for item in items if not item.is_on_host)


def weight_items(twin: MetaTwin, *, embedding_on_host: bool) -> Iterator[MemoryItem]:
    """The base model and its adapter."""
    causal_lm = innermost_causal_lm(twin.model)
    embedding = base_layer(causal_lm.get_input_embeddings()).weight
    head = base_layer(causal_lm.get_output_embeddings()).weight
    linears = quantizable(causal_lm)
    trained = [p for p in twin.model.parameters() if p.requires_grad]
    has_adapter = hasattr(twin.model, "peft_config")
    named = {id(p) for p in (embedding, head, *linears)}
    if has_adapter:
        named |= {id(p) for p in trained}
    others = [p for p in twin.model.parameters() if id(p) not in named]
    yield _linear_layers(linears, twin.linears, embedding.dtype)
    where = "on the host" if embedding_on_host else ""
    yield MemoryItem("embedding", _bytes_of([embedding]), where, embedding_on_host)
    if head is not embedding:
        yield MemoryItem("output head", _bytes_of([head]))
    yield MemoryItem("other weights", _bytes_of(others))
    yield MemoryItem("adapter", _bytes_of(trained) if has_adapter else 0)


def training_items(model: nn.Module, args: ORPOConfig) -> Iterator[MemoryItem]:
    """What is there from the first step on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    yield MemoryItem("gradients", _bytes_of(trained))
    name = str(getattr(args.optim, "value", args.optim))
    states = sum(state_bytes(name, p.element_size()) * p.numel() for p in trained)
    note = name if _states_of(name) is not None else f"{name}, counted as AdamW"
    yield MemoryItem("optimiser", int(states), note)


def state_bytes(optim: str, weight_bytes: int) -> float:
    """Bytes of an optimiser's state for each trained weight.

    Args:
        optim: a name of transformers' `optim`; one that is not known is taken for AdamW.
        weight_bytes: of the weight itself, whose dtype torch's own optimisers keep.
    """
    states = _states_of(optim)
    count = 2 if states is None else states
    if optim.endswith("8bit") or "8bit_" in optim:
        return count * 1.0
    if optim.endswith("4bit"):
        return count * 0.5
    is_of_bitsandbytes = optim.startswith("paged_") or optim.endswith(("_32bit", "_bnb"))
    return float(count * (4 if is_of_bitsandbytes else weight_bytes))


def _states_of(optim: str) -> float | None:
    if optim.startswith(("galore", "apollo")):
        return None  # of a low rank that the arguments do not say
    return next((count for name, count in _STATES.items() if name in optim), None)


def quantizable(causal_lm: Any) -> list[torch.Tensor]:
    """The weights that bitsandbytes would quantise: of all linear layers but the head."""
    from transformers.pytorch_utils import Conv1D

    inside_head = set(causal_lm.get_output_embeddings().modules())
    return [
        module.weight
        for name, module in causal_lm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module not in inside_head
        and "lora_" not in name
    ]


def largest_linear(twin: MetaTwin) -> int:
    """Bytes of the largest quantised layer as it is unpacked for its product."""
    weights = quantizable(innermost_causal_lm(twin.model))
    return max((w.numel() for w in weights), default=0) * twin.dtype.itemsize


def _linear_layers(
    linears: Sequence[torch.Tensor], storage: Storage, dtype: torch.dtype
) -> MemoryItem:
    count = sum(p.numel() for p in linears)
    size, note = _bytes_of(linears), str(dtype).removeprefix("torch.")
    if storage.bits == 8:
        size, note = count, "8 bits"
    elif storage.bits == 4:
        scales = count // _NF4_BLOCK
        nested = scales + 4 * (scales // _NESTED_BLOCK)
        size = count // 2 + (nested if storage.has_nested_scales else 4 * scales)
        note = "4 bits"
    return MemoryItem("linear layers", size, note)


def _bytes_of(parameters: Sequence[torch.Tensor]) -> int:
    unique = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in unique.values())
