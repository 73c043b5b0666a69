"""The LoRA adapter: which layers it sits on, and what a trainer must refuse or arrange for it."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config.options import LoraOptions
from ..errors import ModelError
from .host_memory import host_weight


def lora_config(options: LoraOptions) -> Any | None:
    """Build PEFT's LoraConfig from the options; None where `use_peft` is false.

    Raises:
        ModelError: a value that PEFT refuses.
    """
    if not options.use_peft:
        return None
    from peft import LoraConfig

    # PEFT's word for every linear layer but the output head.
    targets = options.lora_target_modules or "all-linear"
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # PEFT takes text for a pattern of whole paths
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=targets,
            modules_to_save=options.lora_modules_to_save,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
        )
    except ValueError as error:
        raise ModelError(f"LoRA options: {error}") from None


_RATES = (
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "residual_dropout",
    "dropout",
)


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout layer of the base model off; an adapter's own stays."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name.split("."):
            module.p = 0.0
    for module in model.modules():
        # Some layers hand a rate to a function; there is no nn.Dropout to find.
        for rate in _RATES:
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def wrap_with_adapter(model: Any, peft_config: Any, name: str = "default") -> Any:
    """Put an adapter on a model.

    Args:
        model: a transformers model, not yet wrapped.
        peft_config: a PEFT configuration that keeps one hidden state per input token.
        name: what PEFT calls the adapter.

    Returns:
        The PeftModel.

    Raises:
        ModelError: the model has an adapter already, the configuration adds virtual tokens, or
            none of its target modules exists.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ModelError(
            f"peft_config must be a PEFT configuration such as LoraConfig, "
            f"found {type(peft_config).__name__}"
        )
    if isinstance(model, PeftModel):
        raise ModelError(
            "the model already has an adapter and peft_config asks for another; "
            "pass the wrapped model without peft_config, or merge the adapter first"
        )
    refuse_virtual_tokens(peft_config)
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    for wanted in getattr(peft_config, "modules_to_save", None) or ():
        if wanted.split(".")[-1] not in names:
            raise ModelError(f"modules_to_save: {type(model).__name__} has no module {wanted!r}")
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that has changed; nothing a user can mend.
            warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
            return get_peft_model(model, peft_config, adapter_name=name)
    except (ValueError, TypeError, RuntimeError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        quantised = " with quantised weights" if getattr(model, "is_quantized", False) else ""
        raise ModelError(
            f"the adapter does not fit {type(model).__name__}{quantised}: {first_line}"
        ) from None


def refuse_virtual_tokens(peft_config: Any) -> None:
    """Raise a ModelError for prompt-learning adapters, which move every position."""
    if peft_config.is_prompt_learning:
        raise ModelError(
            f"{peft_config.peft_type.value} adds virtual tokens in front of the prompt, "
            "which the scored rows do not know of; use LoRA"
        )


@contextlib.contextmanager
def adapter_switched_off(model: Any) -> Iterator[None]:
    """The base model for a while: the adapter is bypassed, no second model is loaded."""
    disable = getattr(model, "disable_adapter", None)
    if disable is None:
        raise ModelError("the model has no adapter to switch off")
    with disable():
        yield


def base_layer(module: Any) -> Any:
    """The layer inside PEFT's wrappers of it."""
    while True:
        inner = getattr(module, "original_module", None)
        inner = getattr(module, "base_layer", None) if inner is None else inner
        if inner is None:
            return module
        module = inner


@contextlib.contextmanager
def no_needless_casts(model: Any, *, is_autocast: bool) -> Iterator[None]:
    """Keep PEFT from copying a layer's input to fp32 where autocast casts it back at once.

    Under autocast an adapter's fp32 weights are cast for the product anyway. PEFT casts the input
    to fp32 first: each LoRA layer then keeps a copy of its own for the backward pass. The values
    are the same with and without, since every half is an fp32 number. DoRA computes its norm
    from that input, so it is left as it is.

    Args:
        model: any model; must hold for the backward pass too, where layers are recomputed.
        is_autocast: whether the passes run under autocast.
    """
    adapters = getattr(model, "peft_config", {}).values()
    if not is_autocast or not adapters or any(getattr(a, "use_dora", False) for a in adapters):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model):
        yield


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count of trainable parameters, and of all.

    4-bit weights count as many as they stand for, an embedding that is kept on the host too.
    """
    counts = [(_weights_in(p), p.requires_grad) for p in model.parameters()]
    on_host = host_weight(model)
    if on_host is not None:
        counts.append((on_host.numel(), False))
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def _weights_in(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device
