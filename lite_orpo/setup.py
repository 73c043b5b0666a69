"""What `ORPOTrainer` arranges before its first step: call, launch, tokenizer, model and adapter.

Each function refuses, in one line, what would otherwise train silently wrong.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.integrations import TensorBoardCallback

from .config.legacy_names import kept
from .config.options import ModelOptions
from .config.orpo_config import ORPOConfig
from .data.preparation import LengthRule
from .errors import ConfigError, ModelError
from .model.adapter import disable_dropout, refuse_virtual_tokens, wrap_with_adapter
from .model.head import innermost_causal_lm
from .model.host_memory import place_embedding
from .model.load import load_model, load_tokenizer, refuse_encoder_decoder
from .model.quantization import keep_gradients_on_cpu, refuse_untrainable

logger = logging.getLogger(__name__)


def check_launch(args: Any) -> None:
    """Refuse arguments of another trainer, and several GPUs without a launcher.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(args, ORPOConfig):
        raise ConfigError(f"args must be a lite_orpo.ORPOConfig, found {type(args).__name__}")
    if args.use_liger_kernel:
        raise ConfigError(
            "use_liger_kernel replaces the forward pass that the fused loss scores rows in; "
            "leave it false"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible but the run was not launched for them; start it with "
            f"`accelerate launch --num_processes {args.n_gpu} ...`, or set CUDA_VISIBLE_DEVICES=0"
        )


def check_parallelism(trainer: Any) -> None:
    """Refuse what shards the model in a way that is not known to give the same gradients.

    Raises:
        ConfigError: DeepSpeed or the first FSDP is on, by argument or by launcher.
    """
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed is not supported yet; use plain data parallelism, "
            "`accelerate launch --multi_gpu ...`, or FSDP 2"
        )
    if not trainer.is_fsdp_enabled:
        return
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        raise ConfigError(f"FSDP {version} is not supported; set fsdp_version: 2")
    for name in ("offload_embedding", "activation_offloading"):
        if getattr(trainer.args, name):
            raise ConfigError(f"{name} is not supported with FSDP; leave it out")
    logger.warning(
        "FSDP 2 has been tested here on CPU ranks only, not on GPUs; compare the first steps with "
        "a run on one"
    )


_UNUSED = {
    "data_collator": "pairs are put together here; leave it out (rows go to train_dataset=)",
    "compute_metrics": "no logits are made to compute them from; TRL's metrics are always logged",
    "preprocess_logits_for_metrics": "no logits are made; leave it out",
}


def refuse_unused(**arguments: Any) -> None:
    """Refuse arguments of TRL's trainer that nothing here could use.

    Raises:
        ConfigError: one of them is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(
                f"{name} (found {type(value).__name__}) cannot be used: {_UNUSED[name]}"
            )


def resolve_model(model: Any, args: ORPOConfig, model_init: Callable[[], Any] | None) -> Any:
    """The model that was given, made by `model_init`, or named in the arguments.

    Args:
        model: a model, a name, or None.
        args: may name it (`model_name_or_path`), and say how a name is loaded
            (`model_init_kwargs`, `trust_remote_code`).
        model_init: makes the model; called once, without arguments.

    Returns:
        A model, or the options to load one by.

    Raises:
        ConfigError: two different models, or a way to load what is loaded already.
        ModelError: there is none.
    """
    named, init = kept(args, "model_name_or_path"), kept(args, "model_init_kwargs")
    if model_init is not None:
        if model is not None:
            raise ConfigError("model and model_init are both given; give one")
        model = model_init()
    if model is None and named is None:
        raise ModelError("ORPOTrainer needs a model: a CausalLM or a name to load one by")
    name = model if isinstance(model, str) else getattr(model, "name_or_path", None) or named
    if model is not None and named not in (None, name):
        raise ConfigError(
            f"model_name_or_path is {named!r} in the arguments, but model is {name!r}; give one"
        )
    if model is not None and not isinstance(model, str):
        if init:
            raise ConfigError(
                f"model_init_kwargs ({', '.join(init)}) say how to load a model by its name, but "
                "model is loaded already; load it with them, and leave them out here"
            )
        return model
    trusts = bool(kept(args, "trust_remote_code"))
    options = ModelOptions(model_name_or_path=name, trust_remote_code=trusts)
    return replace(options, **_load_options(init or {}))


_INIT_KWARGS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    **{
        name: name
        for name in ("attn_implementation", "trust_remote_code", "load_in_4bit", "load_in_8bit")
    },
}
# What only says again how a model is trained here anyway.
_IMPLIED_INIT_KWARGS = {"use_cache": (False,), "low_cpu_mem_usage": (True, False)}


def _load_options(init: Any) -> dict[str, Any]:
    if not isinstance(init, dict):
        raise ConfigError(f"model_init_kwargs must be a dictionary, found {init!r}")
    options = {}
    for name, value in init.items():
        if name in _IMPLIED_INIT_KWARGS and value in _IMPLIED_INIT_KWARGS[name]:
            continue
        if name not in _INIT_KWARGS:
            raise ConfigError(
                f"model_init_kwargs: {name} is not known (known: {', '.join(_INIT_KWARGS)}); load "
                "the model with it yourself, and pass the model"
            )
        is_dtype = isinstance(value, torch.dtype)
        options[_INIT_KWARGS[name]] = str(value).removeprefix("torch.") if is_dtype else value
    return options


def resolve_tokenizer(model: Any, processing_class: Any, tokenizer: Any) -> Any:
    """The tokenizer that was given under either name, or the model's own.

    Raises:
        ConfigError: two different ones were given.
        ModelError: none was given and none is known to belong to the model.
    """
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise ConfigError("processing_class and tokenizer are both set, to different tokenizers")
    given = processing_class if processing_class is not None else tokenizer
    if given is not None:
        return given
    if isinstance(model, ModelOptions):
        return load_tokenizer(model)
    name = getattr(innermost_causal_lm(model), "name_or_path", "")
    if not name:
        raise ModelError("the model does not name its tokenizer; pass processing_class")
    return load_tokenizer(ModelOptions(model_name_or_path=name))


def pad_token_id(tokenizer: Any) -> int:
    """A token to fill rows with; it is masked and never scored, so any will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def prepare_model(model: Any, args: ORPOConfig, peft_config: Any) -> Any:
    """Load, check and wrap the model.

    Args:
        model: what `resolve_model` returned.
        args: the run's arguments.
        peft_config: the adapter to put on it, or None.

    Raises:
        ModelError: the model cannot be trained here, or the adapter does not fit it.
    """
    if isinstance(model, ModelOptions):
        model = load_model(model, args.device, trains_all_weights=peft_config is None)
    causal_lm = innermost_causal_lm(model)
    get_head = getattr(causal_lm, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise ModelError(
            f"{type(causal_lm).__name__} has no language-model head; load the model with "
            "AutoModelForCausalLM"
        )
    config = getattr(causal_lm, "config", None)
    refuse_encoder_decoder(config, type(causal_lm).__name__)
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            "the model's config asks for the router's auxiliary loss (output_router_logits), "
            "which is not part of the loss here; set it to false"
        )
    for adapter in getattr(model, "peft_config", {}).values():
        refuse_virtual_tokens(adapter)
    if args.disable_dropout:
        disable_dropout(causal_lm)
    if peft_config is not None:
        model = wrap_with_adapter(model, peft_config)
    refuse_untrainable(model)
    place_embedding(model, on_host=args.offload_embedding)
    keep_gradients_on_cpu(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "pass a peft_config"
        if causal_lm is not model:
            remedy = "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
        raise ModelError(f"no parameter of the model is trainable; {remedy}")
    check_trained_dtypes(model)
    if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        # A frozen embedding cuts the graph in front of the first checkpoint.
        model.enable_input_require_grads()
    return model


def check_trained_dtypes(model: Any) -> None:
    """Refuse weights that train in fp16, and warn of those in bf16.

    Raises:
        ModelError: see above.
    """
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    remedy = "load the model with dtype=torch.float32, or train an adapter"
    if torch.float16 in dtypes:
        raise ModelError(
            f"weights that train are fp16, where an optimiser step overflows or is lost; {remedy}"
        )
    if torch.bfloat16 in dtypes:
        logger.warning(
            "weights that train are bf16: steps smaller than 1/256 of a weight are lost; %s", remedy
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Raises:
        ModelError: see above.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= embeddings:
        raise ModelError(
            f"the tokenizer has token ids up to {highest}, but the model embeds {embeddings} "
            "tokens; use the model's own tokenizer, or model.resize_token_embeddings(...)"
        )


def length_rule(model: Any, args: ORPOConfig) -> LengthRule:
    """The rule for over-long rows: `max_length`, and never beyond the model's positions."""
    config = innermost_causal_lm(model).config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    max_length = args.max_length
    if positions and (max_length is None or max_length > positions):
        logger.warning(
            "max_length %s is beyond the model's %d positions: %d is used",
            max_length,
            positions,
            positions,
        )
        max_length = int(positions)
    return LengthRule(max_length, args.overlong_rows)


def direct_tensorboard(trainer: Any) -> None:
    """Let TensorBoard write into `logging_dir`, where the arguments were given that old name."""
    folder = kept(trainer.args, "logging_dir")
    if folder is None:
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = os.path.expanduser(folder)
