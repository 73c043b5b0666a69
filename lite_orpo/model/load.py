"""Loading the base model and its tokenizer, in the dtype that the device truly has."""

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..allocator_failure import is_out_of_memory
from ..config.options import ModelOptions
from ..config.orpo_config import gpu_has_bf16
from ..errors import HubError, ModelError, UserError
from .quantization import quantization_config, quantization_method, refuse_contradictions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_dtype(name: str, device: torch.device, *, trains_all_weights: bool) -> torch.dtype:
    """Resolve the option `dtype`.

    Args:
        name: "auto" or a name of `DTYPES`.
        device: where the model will be.
        trains_all_weights: then "auto" keeps fp32 master weights; autocast computes in half.

    Returns:
        bf16 on GPUs that have it, fp16 on other CUDA GPUs, fp32 elsewhere.

    Raises:
        ModelError: the name is unknown.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}; found {name!r}")
    if trains_all_weights or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if gpu_has_bf16() else torch.float16


def load_model(options: ModelOptions, device: torch.device, *, trains_all_weights: bool) -> Any:
    """Load the base model: onto the CPU, from where the trainer moves it; quantised, in place.

    Raises:
        ModelError: no such folder, no causal language model, or an unknown dtype.
        HubError: the name is no folder and the hub does not give it.
    """
    from transformers import AutoModelForCausalLM

    name = _required_name(options)
    refuse_contradictions(options, trains_all_weights=trains_all_weights)
    config = load_config(options)
    _refuse_outside(Path(name))
    extra: dict[str, Any] = {}
    if options.attn_implementation is not None:
        extra["attn_implementation"] = options.attn_implementation
    dtype = weight_dtype(options.dtype, device, trains_all_weights=trains_all_weights)
    with loading(name, "model"):
        quantized = quantization_config(options, config, device, dtype)
        if quantized is not None:
            extra["quantization_config"] = quantized
        if quantized is not None or quantization_method(config) is not None:
            # Quantised where it will run: bitsandbytes' layers are not moved afterwards.
            extra["device_map"] = {"": device}
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=options.model_revision,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            **extra,
        )


def load_config(options: ModelOptions) -> Any:
    """Load the base model's configuration alone.

    Raises:
        ModelError: no such folder, or no causal language model.
        HubError: the name is no folder and the hub does not give it.
    """
    from transformers import AutoConfig

    name = _required_name(options)
    with loading(name, "model"):
        config = AutoConfig.from_pretrained(
            name, revision=options.model_revision, trust_remote_code=options.trust_remote_code
        )
        refuse_encoder_decoder(config, name)
        _refuse_hub_kernel(config, options, name)
        return config


def load_tokenizer(options: ModelOptions) -> Any:
    """Load the tokenizer, with the chat template from `chat_template_path` where one is given.

    Raises:
        ModelError: no such folder or template file.
        HubError: the name is no folder and the hub does not give it.
    """
    from transformers import AutoTokenizer

    folder = Path(str(options.model_name_or_path)).expanduser()
    # An adapter's folder has the tokenizer that it was trained with, and no config.json.
    has_own = (folder / "tokenizer_config.json").is_file()
    name = str(folder) if has_own else _required_name(options)
    with loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=options.model_revision, trust_remote_code=options.trust_remote_code
        )
    if options.chat_template_path is not None:
        path = Path(options.chat_template_path)
        if not path.is_file():
            raise ModelError(f"chat_template_path: {path}: no such file")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise a ModelError for encoder-decoder models, which ORPO here does not train."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); "
            "lite-orpo trains decoder-only causal language models"
        )


def _required_name(options: ModelOptions) -> str:
    if options.model_name_or_path is None:
        raise ModelError("model_name_or_path is not set; give a folder or a name on the hub")
    name = options.model_name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"model_name_or_path: {name} holds an adapter; name the base model that it belongs to, "
            "or merge the two first"
        )
    if looks_local and not path.is_dir():
        raise ModelError(f"model_name_or_path: {name}: no such folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model_name_or_path: {name}: the folder has no config.json")
    return str(path) if path.is_dir() else name


def _refuse_hub_kernel(config: Any, options: ModelOptions, name: str) -> None:
    """A config.json can name attention code on the hub, which transformers would fetch and run."""
    wanted = getattr(config, "_attn_implementation", None)
    is_asked_for = options.attn_implementation is not None or options.trust_remote_code
    if isinstance(wanted, str) and "/" in wanted and not is_asked_for:
        raise ModelError(
            f"{name}: its config.json asks for attention code from the hub ({wanted[:60]}); set "
            "attn_implementation (sdpa, or that name to run it)"
        )


def _refuse_outside(folder: Path) -> None:
    """Refuse an index of weights that names files outside of the model's folder."""
    for path in folder.glob("*.index.json") if folder.is_dir() else ():
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise ModelError(f"{folder}: {path.name} is damaged") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise ModelError(f"{folder}: {path.name} names a file outside of it ({name!r})")


@contextlib.contextmanager
def loading(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a name that it cannot load into our one line."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{name}: the {what} cannot be loaded: its weights are a pickle that holds more than "
            "tensors, and could run code; get them as safetensors"
        ) from error
    except Exception as error:  # a folder can hold anything, and raise whatever Python can
        if is_out_of_memory(error):
            raise
        if not Path(name).is_dir() and not isinstance(error, (OSError, ValueError)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, (OSError, ValueError)):
            lines[0] = f"{type(error).__name__}: {lines[0]}"
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: the {what} is Python code that ships with it; read it, and set "
                "trust_remote_code: true to run it"
            ) from error
        if Path(name).is_dir():
            raise ModelError(f"{name}: the {what} cannot be loaded: {lines[0]}") from error
        raise HubError(
            f"{what} {name!r} is no local folder, and the hub did not give it ({lines[0]}); "
            "check the name and the network, or give a local folder"
        ) from error
