"""Tiny random models, rows and trainers for the tests of this folder."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import char_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from lite_orpo import ORPOConfig, ORPOTrainer

TOKENIZER = char_tokenizer()

# Names that families give to the same thing; what a configuration does not know, it ignores.
_SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 16}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# The head's transforms are far from 1 here, so that leaving one out cannot pass.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 3.0},
    "phi3": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "olmo2": {},
    "gpt2": _GPT2,
    "mixtral": {**_EXPERTS, "sliding_window": None},
}


def tiny_config(name: str = "llama", **settings: Any) -> Any:
    """The configuration of a `tiny_model`."""
    known = {**_SIZES, **ARCHITECTURES.get(name, {}), **settings}
    if name == "falcon":
        del known["head_dim"]  # computed there, and cannot be set
    config = AutoConfig.for_model(name, **known)
    for rate in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "dropout"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    return config


def tiny_model(
    name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A random model of a family, with weights large enough for logits of a few nats."""
    config = tiny_config(name, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.3)
            elif not parameter.any():
                parameter.normal_(0.0, 0.3)  # biases, which begin at zero
    return model.to(dtype)


def with_lora(model: Any, *, seed: int = 1, **settings: Any) -> Any:
    """The model with a LoRA adapter that already does something."""
    options = {
        "r": 4,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        **settings,
    }
    model = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


_WORDS = ["sun", "a red cat", "rain on tin", "no", "seven", "old oak", "tea", "blue ice", "x"]


def plain_rows(count: int) -> list[dict[str, str]]:
    """Distinct plain rows whose prompts and completions differ in length."""
    return [
        {
            "prompt": f"{i} say {_WORDS[i % 9]}: ",
            "chosen": f"{_WORDS[i % 7]} {i}!",
            "rejected": f"{_WORDS[(i * 5 + 3) % 8]}" + "?" * (i % 5) + f"{i}",
        }
        for i in range(count)
    ]


def quiet_config(output_dir: Any, **settings: Any) -> ORPOConfig:
    """Arguments that train on the CPU in fp32 and write nothing that was not asked for."""
    options = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_length": None,
        **settings,
    }
    return ORPOConfig(output_dir=str(output_dir), **options)


def trainer_for(model: Any, output_dir: Any, rows: Any = None, **settings: Any) -> ORPOTrainer:
    """An ORPOTrainer over plain rows; `eval_dataset` and `callbacks` are handed on."""
    handed_on = ("eval_dataset", "callbacks", "peft_config", "optimizers")
    extra = {name: settings.pop(name) for name in handed_on if name in settings}
    return ORPOTrainer(
        model=model,
        args=quiet_config(output_dir, **settings),
        train_dataset=plain_rows(4) if rows is None else rows,
        processing_class=TOKENIZER,
        **extra,
    )


def trainable_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients there are, by parameter name."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step_gradients(trainer: ORPOTrainer, batches: list[list[Any]]) -> tuple[float, dict]:
    """Loss and gradients of one optimiser step over the given batches of prepared pairs."""
    trainer.model.zero_grad()
    entries, _ = trainer.get_batch_samples(
        iter([{"pairs": batch} for batch in batches]), len(batches), trainer.args.device
    )
    loss = sum(float(trainer.training_step(trainer.model, entry)) for entry in entries)
    return loss, trainable_gradients(trainer.model)


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = trainable_gradients(kwargs["model"])
        self.steps.append({name.removeprefix("module."): g for name, g in gradients.items()})


def relative_error(left: dict, right: dict) -> float:
    """The worst parameter's norm of the difference, relative to its own norm.

    Where the true gradient is zero (a bias in front of a softmax) there is rounding alone; it is
    measured against a thousandth of the largest norm.
    """
    assert left.keys() == right.keys()
    assert left
    floor = 1e-3 * max(float(gradient.norm()) for gradient in right.values())
    return max(
        float((left[name] - right[name]).norm()) / max(float(right[name].norm()), floor)
        for name in right
    )


def whole_relative_error(left: dict, right: dict) -> float:
    """The norm of the difference of all gradients together, relative to their norm."""
    assert left.keys() == right.keys()
    assert left
    difference = sum(float((left[name] - right[name]).norm()) ** 2 for name in right)
    return (difference / sum(float(right[name].norm()) ** 2 for name in right)) ** 0.5


def of_the_loss(log: dict[str, float]) -> set[str]:
    """Keys of a log line that say what was computed, not how fast or in how many rows."""
    return {key for key in log if not key.startswith("lite_orpo/")}
