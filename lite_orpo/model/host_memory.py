"""Keeping in the host's memory what a GPU needs only now and then.

The input embedding, of which a step looks up a few thousand rows; and what the backward pass needs
of the forward pass, which lies idle in between.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.orpo_config import ORPOConfig
from ..errors import ConfigError, ModelError
from .head import innermost_causal_lm

# Tensors that are still on their way to the host while the next layers compute.
COPIES_UNDER_WAY = 5
# Smaller tensors are not worth the copy; bytes.
OFFLOADED_FROM = 1024
OFFLOADING_DEVICES = ("cuda", "xpu")


def offloaded_activations(model: Any, args: ORPOConfig) -> AbstractContextManager[Any]:
    """A context that moves what the backward pass needs to the host, and back when it needs it.

    TRL's `OffloadActivations`: pinned memory, and a stream of its own, so that the copies run
    beside the computation. With activation checkpointing only the layers' inputs are kept, and
    so only they are moved. Enter it anew for each forward and backward pass.

    Args:
        model: as it trains.
        args: `activation_offloading` and the device; nothing is moved without the one, nor on
            any other than CUDA and XPU.

    Raises:
        ConfigError: TRL is not installed.
    """
    if not args.activation_offloading or args.device.type not in OFFLOADING_DEVICES:
        return nullcontext()
    try:
        from trl.models.activation_offloading import get_act_offloading_ctx_manager
    except ImportError:
        raise ConfigError(
            "activation_offloading needs TRL (pip install trl); leave it out"
        ) from None
    offloading: AbstractContextManager[Any] = get_act_offloading_ctx_manager(
        model,
        min_offload_size=OFFLOADED_FROM,
        max_fwd_stash_size=COPIES_UNDER_WAY,
        warn_if_no_head=False,
    )
    return offloading


def place_embedding(model: Any, *, on_host: bool) -> None:
    """Put the input embedding where a run wants it, from wherever an earlier run left it.

    Raises:
        ModelError: it is to be on the host and cannot be, or no adapter trains instead of it.
    """
    if not on_host:
        take_embedding_back(model)
        return
    if not hasattr(model, "peft_config"):
        raise ModelError(
            "offload_embedding: all weights train, the embedding too, which must be on the device "
            "then; train an adapter, or leave it out"
        )
    keep_embedding_on_host(model)


def keep_embedding_on_host(model: Any) -> None:
    """Keep the input embedding out of the device's memory.

    Its weight becomes a plain tensor in the host's memory: `model.to(device)` does not move it
    and data parallelism does not see it, while `state_dict()` still has it. At each call the
    rows that are asked for go to the model's device, in its dtype, and the layer's own code runs
    on them there, with whatever it does beside the lookup. The result is bitwise the same.

    Args:
        model: a transformers CausalLM, maybe wrapped by PEFT; changed in place.

    Raises:
        ModelError: the embedding trains, is also the output head, or is no plain embedding.
    """
    if host_weight(model) is not None:
        return
    refuse_embedding_on_host(model)
    causal_lm = innermost_causal_lm(model)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    own_rows = _some_rows(embedding)
    weight = embedding.weight.detach().to("cpu")
    del embedding.weight
    embedding.weight = embedding.lite_orpo_host_weight = weight
    # Moves with the model, and so tells where it is and in which dtype.
    marker = torch.empty(0, device=head.weight.device, dtype=weight.dtype)
    embedding.register_buffer("lite_orpo_marker", marker, persistent=False)
    # A partial function, unlike a method of no class, can be copied and pickled with the model.
    embedding.forward = functools.partial(_look_up, embedding)
    embedding.lite_orpo_hooks = (
        embedding.register_state_dict_post_hook(_put_into),
        embedding.register_load_state_dict_pre_hook(_take_from),
    )
    rows = _some_rows(embedding)
    if own_rows is not None and rows is not None and not torch.equal(own_rows, rows):
        take_embedding_back(model)
        raise ModelError(
            f"offload_embedding: {type(embedding).__name__} does more with token ids than look "
            "rows up; leave it out"
        )


def take_embedding_back(model: Any) -> None:
    """Undo `keep_embedding_on_host`: the weight is a parameter on the model's device again."""
    weight = host_weight(model)
    if weight is None:
        return
    embedding = innermost_causal_lm(model).get_input_embeddings()
    marker = embedding.lite_orpo_marker
    for hook in embedding.lite_orpo_hooks:
        hook.remove()
    del embedding.forward, embedding.weight, embedding.lite_orpo_host_weight
    del embedding.lite_orpo_marker, embedding.lite_orpo_hooks
    trains = not hasattr(model, "peft_config")
    embedding.weight = nn.Parameter(weight.to(marker.device, marker.dtype), requires_grad=trains)


def refuse_embedding_on_host(model: Any) -> None:
    """Raise a ModelError if a model's embedding cannot be kept on the host."""
    causal_lm = innermost_causal_lm(model)
    embedding = causal_lm.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or "forward" in embedding.__dict__:
        raise ModelError(
            f"offload_embedding: something has changed the input embedding "
            f"({type(embedding).__name__}), perhaps an adapter that trains it; leave it out"
        )
    if embedding.weight is causal_lm.get_output_embeddings().weight:
        raise ModelError(
            f"offload_embedding: {type(causal_lm).__name__} uses its embedding as the output head "
            "too, which the loss needs on the device; leave it out"
        )
    if embedding.weight.requires_grad:
        raise ModelError(
            "offload_embedding: the embedding trains, and so must be on the device; train an "
            "adapter, or leave it out"
        )


def host_weight(model: Any) -> Tensor | None:
    """The embedding's weight [V, D] that is kept on the host, None where none is."""
    embedding = innermost_causal_lm(model).get_input_embeddings()
    return getattr(embedding, "lite_orpo_host_weight", None)


# These get the module as an argument and close over nothing: a copy of the model must use its own.


def _look_up(embedding: Any, input_ids: Tensor) -> Any:
    marker, table = embedding.lite_orpo_marker, embedding.lite_orpo_host_weight
    rows = table.index_select(0, input_ids.flatten().to(table.device))
    rows = rows.to(marker.device, marker.dtype)
    numbers = torch.arange(rows.shape[0], device=marker.device).view(input_ids.shape)
    padding = embedding.padding_idx
    # Numbers of rows take the place of ids, among which none means padding.
    embedding.weight, embedding.padding_idx = rows, None
    try:
        return type(embedding).forward(embedding, numbers)
    finally:
        embedding.weight, embedding.padding_idx = table, padding


@torch.no_grad()
def _some_rows(embedding: Any) -> Tensor | None:
    """What a class of its own makes of ids, of the special ones above all; None for torch's."""
    if type(embedding) is nn.Embedding:
        return None
    most = embedding.num_embeddings
    ids = [*range(min(most, 4096)), *range(max(most - 4096, 0), most)]
    device = embedding.weight.device
    if getattr(embedding, "lite_orpo_marker", None) is not None:
        device = embedding.lite_orpo_marker.device
    rows: Tensor = embedding(torch.tensor([ids], device=device))
    return rows


def _put_into(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    weight = module.lite_orpo_host_weight
    state_dict[f"{prefix}weight"] = weight.to(module.lite_orpo_marker.dtype)


def _take_from(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    name, own = f"{prefix}weight", module.lite_orpo_host_weight
    weight = state_dict.pop(name, None)
    if weight is None:
        if strict:
            missing.append(name)
    elif weight.shape != own.shape:
        errors.append(f"size mismatch for {name}: {tuple(weight.shape)} for {tuple(own.shape)}")
    else:
        own.copy_(weight)
