"""Base weights in 4 or 8 bits by bitsandbytes: what was asked for, and whether it can be had.

Only the base model's linear layers are quantised; embedding, norms and output head stay in the
compute dtype, and no fp32 copies of them are made: norms compute in fp32 inside whatever their
weight is kept in, and the loss never makes logits in half precision.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch

from ..config.options import ModelOptions
from ..errors import ModelError

logger = logging.getLogger(__name__)


def refuse_contradictions(options: ModelOptions, *, trains_all_weights: bool) -> None:
    """Refuse options that contradict each other, before anything is loaded.

    Raises:
        ModelError: see above.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise ModelError("load_in_4bit and load_in_8bit are both set; choose one")
    if options.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ModelError(
            f"bnb_4bit_quant_type must be nf4 or fp4, found {options.bnb_4bit_quant_type!r}"
        )
    if trains_all_weights and (options.load_in_4bit or options.load_in_8bit):
        asked = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
        raise ModelError(f"{asked}: quantised weights cannot train themselves; set use_peft: true")


def quantization_config(
    options: ModelOptions, model_config: Any, device: torch.device, dtype: torch.dtype
) -> Any:
    """The `transformers.BitsAndBytesConfig` that the options ask for.

    Args:
        options: `load_in_4bit`, `load_in_8bit` and what belongs to them.
        model_config: the model's configuration, which says if it is quantised already.
        device: where the model will run.
        dtype: what its layers compute in.

    Returns:
        None where nothing is asked for, the checkpoint is quantised already, or, with a warning,
        this device has no bitsandbytes: then the model is loaded in `dtype`.

    Raises:
        ModelError: a checkpoint that is quantised in another way, or cannot run here.
    """
    asked = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    is_asked = options.load_in_4bit or options.load_in_8bit
    missing = why_no_bitsandbytes(device)
    method = quantization_method(model_config)
    if method is not None:
        if is_asked and asked not in _ways_of(model_config):
            raise ModelError(
                f"{asked}: the checkpoint is quantised already, in another way ({method}); leave "
                "it out"
            )
        if method == "bitsandbytes" and missing is not None:
            raise ModelError(f"the checkpoint is quantised by bitsandbytes, but {missing}")
        return None
    if not is_asked:
        return None
    if missing is not None:
        logger.warning(
            "%s: %s; the model is loaded in %s instead, which takes more memory",
            asked,
            missing,
            str(dtype).removeprefix("torch."),
        )
        return None
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        # It says at every product that it converts the dtype.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def quantization_method(model_config: Any) -> str | None:
    """How a checkpoint or a loaded model is quantised, None if it is not."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return None
    method = _entry(found, "quant_method")
    if method is None:  # as bitsandbytes' checkpoints once were
        return "bitsandbytes" if _ways_of(model_config) else "an unknown method"
    return str(getattr(method, "value", method))


def bits_of_checkpoint(model_config: Any) -> tuple[int | None, bool]:
    """Bits of a checkpoint's or a loaded model's linear layers, and whether scales are nested.

    Returns:
        None for the bits where bitsandbytes' settings say nothing of 4 or 8.
    """
    ways = _ways_of(model_config)
    bits = 4 if "load_in_4bit" in ways else 8 if "load_in_8bit" in ways else None
    found = getattr(model_config, "quantization_config", None)
    return bits, bool(_entry(found, "bnb_4bit_use_double_quant"))


def _ways_of(model_config: Any) -> set[str]:
    found = getattr(model_config, "quantization_config", None)
    return {way for way in ("load_in_4bit", "load_in_8bit") if _entry(found, way)}


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


class _Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


def why_no_bitsandbytes(device: torch.device) -> str | None:
    """Why quantised weights cannot be had on a device, None where they can."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (pip install bitsandbytes)"
    import bitsandbytes

    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda", "cpu"})
    if device.type not in supported:
        return f"bitsandbytes does not run on {device.type}"
    return None


def refuse_untrainable(model: Any) -> None:
    """Refuse quantised base weights without an adapter, or of a kind that takes no gradients.

    Args:
        model: the model as it will train.

    Raises:
        ModelError: see above.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method = quantization_method(getattr(base, "config", None))
    if method is None:
        return
    if not hasattr(model, "peft_config"):
        raise ModelError(
            f"the base weights are quantised ({method}) and cannot train themselves; train an "
            "adapter (use_peft: true, or a peft_config)"
        )
    uses_dora = any(getattr(c, "use_dora", False) for c in model.peft_config.values())
    if uses_dora and getattr(base, "is_loaded_in_8bit", False) and base.device.type == "cpu":
        raise ModelError(
            "DoRA on an 8-bit base fails on CPUs at its second step (peft with bitsandbytes); "
            "set load_in_4bit instead, or use_dora: false"
        )
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise ModelError(f"weights quantised by {method} pass no gradients to an adapter")


def keep_gradients_on_cpu(model: Any) -> None:
    """Keep bitsandbytes' 4-bit layers from a CPU format that passes no gradients.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weight for inference at its first
    call in evaluation mode, and from then on, training included, multiplies by a kernel without
    a backward pass: gradients stop there, with a warning at most. A weight that is repacked
    already is unpacked; its scales have been rounded to bf16 by then.

    Args:
        model: any model; changed in place.

    Raises:
        ModelError: a layer is repacked and cannot be put back.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            try:
                # The function that bitsandbytes itself calls before it saves such a layer.
                from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
            except ImportError:
                raise ModelError(
                    f"{name} was used in evaluation mode before and is in bitsandbytes' inference "
                    "format, which passes no gradients; load the model again and give it to the "
                    "trainer first"
                ) from None
            state = weight.quant_state
            was_nested = getattr(state, "original_nested", False)
            weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
            if not was_nested:
                # bitsandbytes puts nested scales back, but leaves plain ones as it packed them.
                state.absmax = state.absmax.T.reshape(-1).float().contiguous()
            weight.quant_state = state
