"""Options of a run beside the training arguments: model, adapter, data, report.

Plain dataclasses with TRL's flat names, importable without torch, so that `--help` and `init`
answer at once. Training arguments are in `orpo_config.py`.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelOptions:
    """Which base model, and how it is loaded."""

    model_name_or_path: str | None = _option(None, "base model: a folder or a name on the hub")
    model_revision: str = _option("main", "branch, tag or commit on the hub")
    dtype: str = _option(
        "auto", "weights in memory: auto (what the device truly has), float32, bfloat16, float16"
    )
    load_in_4bit: bool = _option(
        False, "base weights in 4 bits (QLoRA, bitsandbytes); the adapter trains in fp32"
    )
    load_in_8bit: bool = _option(False, "base weights in 8 bits (bitsandbytes)")
    bnb_4bit_quant_type: str = _option("nf4", "4-bit data type: nf4 or fp4")
    use_bnb_nested_quant: bool = _option(True, "quantise the 4-bit scales too (0.4 bits less)")
    attn_implementation: str | None = _option(None, "attention backend; default: transformers' own")
    trust_remote_code: bool = _option(False, "run Python code that a hub repository ships")
    chat_template_path: str | None = _option(
        None, "Jinja file to use where the tokenizer has no chat template"
    )


@dataclass(frozen=True)
class LoraOptions:
    """The adapter."""

    use_peft: bool = _option(True, "train a LoRA adapter; false trains the whole model")
    lora_r: int = _option(16, "rank")
    lora_alpha: int = _option(32, "the adapter is scaled by alpha / r")
    lora_dropout: float = _option(0.0, "dropout on the adapter's input")
    lora_target_modules: list[str] | str | None = _option(
        None, "module names; default: all linear layers but the output head"
    )
    lora_modules_to_save: list[str] | None = _option(None, "modules trained in full beside it")
    use_rslora: bool = _option(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool = _option(False, "weight-decomposed LoRA")


@dataclass(frozen=True)
class DataOptions:
    """Which preference pairs."""

    dataset_name: str | None = _option(
        None, "training pairs: .jsonl, .json, .csv (or .gz), .parquet, a folder, or a hub name"
    )
    dataset_config: str | None = _option(None, "configuration name of a hub data set")
    dataset_train_split: str = _option("train", "split to train on")
    eval_dataset_name: str | None = _option(
        None, "held-out pairs; default: the test split of dataset_name, where it has one"
    )
    dataset_test_split: str = _option("test", "split to evaluate on")
    column_mapping: dict[str, str | None] | None = _option(
        None, "columns that have other names: {prompt: question, chosen: good, rejected: bad}"
    )


@dataclass(frozen=True)
class ReportOptions:
    """What a run shows beside its metrics."""

    eval_before_training: bool = _option(True, "evaluate the base model first, to compare with")
    sample_prompts: int = _option(3, "held-out prompts answered before and after; 0 turns it off")
    sample_at_evaluations: bool = _option(
        False, "answer them at each evaluation during training too, and log it"
    )
    sample_max_new_tokens: int = _option(64, "length of those answers in tokens")
    save_plots: bool = _option(True, "write curves.png into the output folder")
    overwrite_output_dir: bool = _option(False, "let a new run replace an older one there")


# A token belongs in the environment or the hub's own login: never in a file that gets shared, nor
# on the terminal.
SECRET_KEYS = {"hub_token"}

OPTION_GROUPS: tuple[type[Any], ...] = (ModelOptions, LoraOptions, DataOptions, ReportOptions)

# Training arguments worth naming in `--help`, which cannot import them (that takes seconds).
COMMON_TRAINING_KEYS = {
    "output_dir": "where adapter, metrics and curves go",
    "beta": "weight of the odds-ratio term (or orpo_alpha and orpo_beta); default 0.1",
    "max_length": "most tokens of prompt + completion; default 1024",
    "overlong_rows": "rows over max_length: drop or cut_prompt",
    "on_bad_row": "rows that cannot be trained on: drop or error",
    "learning_rate": "peak learning rate; default 5e-5",
    "num_train_epochs": "passes over the data; or max_steps",
    "per_device_train_batch_size": "pairs at a time",
    "gradient_accumulation_steps": "batches per optimiser step",
    "eval_strategy": "no, steps or epoch",
    "seed": "default 42",
}


def common_keys() -> list[tuple[str, str]]:
    """Names and one-line texts of the keys that most runs set."""
    own = [(f.name, f.metadata["help"]) for group in OPTION_GROUPS for f in fields(group)]
    return own + list(COMMON_TRAINING_KEYS.items())
