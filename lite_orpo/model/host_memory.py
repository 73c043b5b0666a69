"""Keeping in the host's memory what a GPU needs only now and then.

The input embedding, of which a step looks up a few thousand rows; and what the backward pass needs
of the forward pass, which lies idle in between.
"""

import types
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


def keep_embedding_on_host(model: Any) -> None:
    """Keep the input embedding out of the device's memory.

    Its weight becomes a plain tensor in the host's memory: `model.to(device)` does not move it
    and data parallelism does not see it, while `state_dict()` still has it. At each call the
    rows that are asked for go to the model's device, and the layer's own code runs on them there,
    with whatever it does beside the lookup. The result is bitwise the same.

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
    weight = embedding.weight.detach().to("cpu")
    del embedding.weight
    embedding.weight = embedding.lite_orpo_host_weight = weight
    # Moves with the model, and so tells where it is.
    marker = torch.empty(0, device=head.weight.device)
    embedding.register_buffer("lite_orpo_device", marker, persistent=False)
    embedding.forward = types.MethodType(_look_up, embedding)
    embedding.register_state_dict_post_hook(_put_into)
    embedding.register_load_state_dict_pre_hook(_take_from)


def refuse_embedding_on_host(model: Any) -> None:
    """Raise a ModelError if a model's embedding cannot be kept on the host."""
    causal_lm = innermost_causal_lm(model)
    embedding = causal_lm.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or "forward" in embedding.__dict__:
        raise ModelError(
            f"offload_embedding: the input embedding is a {type(embedding).__name__} that "
            "something else has changed, perhaps an adapter that trains it; leave it out"
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


def _look_up(self: Any, input_ids: Tensor) -> Any:
    device = self.lite_orpo_device.device
    table = self.lite_orpo_host_weight
    rows = table.index_select(0, input_ids.flatten().to(table.device)).to(device)
    numbers = torch.arange(rows.shape[0], device=device).view(input_ids.shape)
    padding = self.padding_idx
    # Numbers of rows take the place of ids, among which none means padding.
    self.weight, self.padding_idx = rows, None
    try:
        return type(self).forward(self, numbers)
    finally:
        self.weight, self.padding_idx = table, padding


def _put_into(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = module.lite_orpo_host_weight


def _take_from(module: Any, state_dict: dict[str, Any], prefix: str, *_others: Any) -> None:
    weight = state_dict.pop(f"{prefix}weight", None)
    if weight is not None:
        module.lite_orpo_host_weight.copy_(weight)
