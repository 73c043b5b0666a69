"""A twin without data of the model that is to be trained, to count on.

It stands on the meta device: shapes, dtypes, adapter and what trains are the model's own. Made
from the options of a run before anything is loaded, or from a model that is there. Quantised
layers are plain linear layers in it; how many bits they have is said beside it.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..config.options import LoraOptions, ModelOptions
from ..errors import ModelError
from .adapter import base_layer, lora_config, trainable_parameters, wrap_with_adapter
from .head import innermost_causal_lm
from .load import load_config, loading, weight_dtype
from .quantization import bits_of_checkpoint, quantization_method, why_no_bitsandbytes


class Storage(NamedTuple):
    """How the weights of linear layers lie in memory."""

    bits: int | None
    """4 or 8; None: as the other weights do."""
    has_nested_scales: bool = False


class MetaTwin(NamedTuple):
    """A model on the meta device, and what it does not say of the true one."""

    model: Any
    """Wrapped by its adapter, in training mode."""
    dtype: torch.dtype
    """Of what is not quantised and does not train."""
    linears: Storage


def twin_of_options(
    options: ModelOptions, lora: LoraOptions, device: torch.device, *, checkpointing: bool
) -> MetaTwin:
    """The twin of the model that these options load.

    Args:
        options: which base model, and how it is loaded.
        lora: the adapter.
        device: where the run will be; decides on dtypes alone.
        checkpointing: whether activations are recomputed.

    Raises:
        ModelError: no such model, or one whose weights are quantised in a way not counted here.
    """
    from transformers import AutoModelForCausalLM

    dtype = weight_dtype(options.dtype, device, trains_all_weights=not lora.use_peft)
    config = load_config(options)
    linears = _storage(config)
    is_asked = options.load_in_4bit or options.load_in_8bit
    if linears.bits is None and is_asked and why_no_bitsandbytes(device) is None:
        linears = Storage(4 if options.load_in_4bit else 8, options.use_bnb_nested_quant)
    attention = {}
    # Flash attention may not be installed here; sdpa takes as little.
    if options.attn_implementation is not None and "flash" not in options.attn_implementation:
        attention["attn_implementation"] = options.attn_implementation
    with loading(str(options.model_name_or_path), "model"), _quietly_on_meta():
        model = AutoModelForCausalLM.from_config(
            _without_quantization(config), dtype=dtype,
            trust_remote_code=options.trust_remote_code, **attention,
        )  # fmt: skip
        adapter = lora_config(lora)
        if adapter is not None:
            model = wrap_with_adapter(model, adapter)
    return MetaTwin(_as_it_trains(model, checkpointing), dtype, linears)


def twin_of_model(model: Any, *, checkpointing: bool) -> MetaTwin:
    """The twin of a model that is loaded.

    Args:
        model: a transformers CausalLM, maybe wrapped by PEFT.
        checkpointing: whether activations are recomputed.

    Raises:
        ModelError: no twin with the same trainable weights can be made.
    """
    causal_lm = innermost_causal_lm(model)
    dtype = base_layer(causal_lm.get_input_embeddings()).weight.dtype
    config = _without_quantization(causal_lm.config)
    try:
        with _quietly_on_meta():
            twin = type(causal_lm)._from_config(config, dtype=dtype)
            if hasattr(model, "peft_config"):
                name = model.active_adapter
                adapter = copy.deepcopy(model.peft_config[name])
                adapter.inference_mode = False
                twin = wrap_with_adapter(twin, adapter, name)
    except Exception as error:  # noqa: BLE001 (whatever the class's own code raises)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"no {type(causal_lm).__name__} can be made from its configuration alone ({first_line})"
        ) from error
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trains.get(name, False))
    if trainable_parameters(twin) != trainable_parameters(model):
        raise ModelError(
            f"{type(causal_lm).__name__} has other weights than its configuration and one adapter "
            "give"
        )
    return MetaTwin(_as_it_trains(twin, checkpointing), dtype, _storage(causal_lm.config))


@contextlib.contextmanager
def _quietly_on_meta() -> Iterator[None]:
    """On the meta device, and without PEFT's warnings: they come when the model is loaded."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        yield


def _as_it_trains(model: Any, checkpointing: bool) -> Any:
    if checkpointing:
        causal_lm = innermost_causal_lm(model)
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        causal_lm.enable_input_require_grads()
    return model.train()


def _storage(config: Any) -> Storage:
    """As a checkpoint or a loaded model has it."""
    method = quantization_method(config)
    if method is None:
        return Storage(None)
    bits, has_nested_scales = bits_of_checkpoint(config)
    if method != "bitsandbytes" or bits is None:
        raise ModelError(f"weights quantised by {method}: what they take is not counted here")
    return Storage(bits, has_nested_scales)


def _without_quantization(config: Any) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
