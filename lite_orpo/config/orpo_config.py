"""ORPOConfig: transformers.TrainingArguments with ORPO's own settings and defaults that fit.

Settings of the loss, of row lengths and of the fused head are here; which model, adapter and
data a command-line run uses is in `options.py`.
"""

import math
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch

from .. import offline_bitsandbytes  # noqa: F401  (before transformers imports it)

# isort: split
from transformers import TrainingArguments

from ..errors import ConfigError
from .legacy_names import takes_old_names
from .loss_types import LOSS_TYPES

DEFAULT_BETA = LOSS_TYPES["orpo"].beta


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def gpu_has_bf16() -> bool:
    """Whether the current CUDA device computes in bf16 itself (a T4 only emulates it)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


_OTHERS_OF_BITSANDBYTES = {"ademamix", "lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"}


def _is_of_bitsandbytes(optim: str) -> bool:
    is_8bit = optim.endswith("8bit") and not optim.startswith(("adamw_torch", "galore"))
    return is_8bit or optim.startswith("paged_") or optim in _OTHERS_OF_BITSANDBYTES


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


@takes_old_names
@dataclass
class ORPOConfig(TrainingArguments):
    """Training arguments for `ORPOTrainer`.

    The strength of the odds-ratio term is `beta` (TRL's name, the paper's lambda) or
    `orpo_alpha` with the temperature `orpo_beta` (the course's names); mixing the two ways is
    refused, since `beta` means the strength in one and the temperature in the other.

    Names of earlier transformers and TRL (`evaluation_strategy`, `max_prompt_length`) are
    translated with one warning, see `legacy_names.py`.

    Every other argument is `transformers.TrainingArguments`'s; these defaults differ: `bf16`
    and `fp16` follow the device, activation checkpointing is on for GPUs, `logging_steps` is 10,
    `remove_unused_columns` and `logging_nan_inf_filter` are always off.

    Raises:
        ConfigError: settings that contradict each other or lie outside their range.
    """

    learning_rate: float = _setting(5e-5, "peak learning rate; LoRA needs more than full training")
    logging_steps: float = _setting(10, "optimiser steps (or share of them) between log lines")
    loss_type: str = _setting("orpo", "orpo, dpo, ipo, simpo, cpo or sft")
    beta: float | None = _setting(
        None,
        f"orpo: weight of the odds-ratio term, TRL's name, default {DEFAULT_BETA}; dpo, ipo, cpo "
        "(0.1) and simpo (2.0): the factor inside",
    )
    orpo_alpha: float | None = _setting(None, "weight of the odds-ratio term, the course's name")
    orpo_beta: float | None = _setting(None, "temperature inside the log-sigmoid; default 1.0")
    simpo_gamma: float | None = _setting(None, "simpo: the margin aimed at; default 1.0")
    cpo_alpha: float | None = _setting(None, "cpo: weight of the NLL; default 1.0")
    reference_cache: str | None = _setting(
        None, "dpo, ipo: folder that keeps the reference's log-probabilities; default output_dir"
    )
    nll_tokens: str | None = _setting(
        None,
        "tokens of the NLL term: prompt_and_completion (the default of orpo, as in TRL) or "
        "completion",
    )
    max_length: int | None = _setting(1024, "most tokens of prompt + completion; null: no limit")
    overlong_rows: str = _setting(
        "drop",
        "rows over max_length: drop, or cut_prompt (drop the prompt's oldest tokens; "
        "completions stay whole)",
    )
    on_bad_row: str = _setting(
        "drop",
        "rows that cannot be trained on: drop (counted and shown; an error above 10 %) or error",
    )
    prefix_sharing: str = _setting(
        "auto",
        "encode each prompt once for both completions, in packed rows: auto (where it is proved "
        "exact on the model), on (an error where it is not) or off",
    )
    max_tokens_per_row: int | str = _setting(
        2048,
        "most tokens in one pass through the model, or auto: as many as the memory plan finds "
        "room for; a longer pair has a pass of its own",
    )
    tree_attention: str = _setting(
        "sdpa", "attention over packed rows: sdpa (everywhere) or varlen (CUDA, not measured yet)"
    )
    resume_despite_changes: bool = _setting(
        False, "go on from a checkpoint of other data, weights, adapter or loss settings"
    )
    max_refused_steps: int = _setting(
        5, "stop after so many steps in a row with a non-finite loss or gradient; none is taken"
    )
    disable_dropout: bool = _setting(True, "turn the base model's dropout off (not LoRA's)")
    loss_backend: str = _setting(
        "auto", "of the fused head and loss: auto, triton, chunked or reference"
    )
    activation_offloading: bool = _setting(
        False, "keep what the backward pass needs in host memory meanwhile (CUDA; slower; TRL)"
    )
    offload_embedding: bool = _setting(
        False, "keep the input embedding in host memory (adapters; not where it is the head too)"
    )
    loss_workspace_mib: int = _setting(64, "memory for blocks of logits, in MiB")
    bf16: bool | None = _setting(None, "bf16 autocast; default: where the GPU truly has it")
    fp16: bool | None = _setting(None, "fp16 autocast; default: on GPUs without bf16")

    def __post_init__(self) -> None:
        """Resolve what depends on the device, check our own settings, then transformers'."""
        self._check_loss_settings()
        self._check_run_settings()
        self._check_data_settings()
        self._resolve_precision()
        self._resolve_activation_checkpointing()
        # The loader yields raw pairs, which are no columns of the model's; and a NaN loss must
        # be seen, not replaced by the running mean.
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor is not part of these losses; leave it at 0")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy gets: all but the token, which libraries would write to files."""
        return {**self.__dict__, "hub_token": None}

    @property
    def odds_ratio_weight(self) -> float:
        """The factor on the odds-ratio term (the paper's lambda)."""
        for value in (self.orpo_alpha, self.beta):
            if value is not None:
                return value
        return DEFAULT_BETA

    @property
    def odds_ratio_temperature(self) -> float:
        """The factor on the log odds ratio inside the log-sigmoid."""
        return 1.0 if self.orpo_beta is None else self.orpo_beta

    @property
    def preference_beta(self) -> float:
        """`beta` as the loss has it: ORPO's weight, elsewhere the factor inside."""
        if self.loss_type == "orpo":
            return self.odds_ratio_weight
        return LOSS_TYPES[self.loss_type].beta if self.beta is None else self.beta

    @property
    def is_checkpointing(self) -> bool:
        """Whether activations are recomputed, under either of transformers' names for it."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        return any(bool(getattr(self, name, False)) for name in names)

    def _check_loss_settings(self) -> None:
        course_names = [n for n in ("orpo_alpha", "orpo_beta") if getattr(self, n) is not None]
        if self.beta is not None and course_names:
            raise ConfigError(
                f"beta and {' and '.join(course_names)} are both set: beta alone is the strength "
                "of the odds-ratio term (as in TRL), orpo_alpha the strength and orpo_beta the "
                "temperature (as in the course); use one way"
            )
        if self.loss_type not in LOSS_TYPES:
            nearest = get_close_matches(str(self.loss_type), LOSS_TYPES, n=1)
            if self.loss_type == "sigmoid":  # TRL's name for it
                nearest = ["dpo"]
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(
                f"loss_type must be one of {', '.join(LOSS_TYPES)}, found {self.loss_type!r}{hint}"
            )
        for other, kind in LOSS_TYPES.items():
            for name in kind.own_settings if other != self.loss_type else ():
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} belongs to loss_type {other}, but loss_type is {self.loss_type}; "
                        "leave it out"
                    )
        if self.loss_type == "sft" and self.beta is not None:
            raise ConfigError("beta has no meaning with loss_type sft; leave it out")
        if self.nll_tokens is None:
            self.nll_tokens = LOSS_TYPES[self.loss_type].nll_tokens
        for name in ("beta", "orpo_alpha", "simpo_gamma", "cpo_alpha"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 0):
                raise ConfigError(f"{name} must be a number and not negative, found {value!r}")
        if self.loss_type != "orpo" and self.beta == 0:
            raise ConfigError(f"beta must be positive with loss_type {self.loss_type}")
        if self.orpo_beta is not None and not (_is_number(self.orpo_beta) and self.orpo_beta > 0):
            raise ConfigError(f"orpo_beta must be a positive number, found {self.orpo_beta!r}")

    def _check_run_settings(self) -> None:
        for name, least in (
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("max_refused_steps", 1),
            ("seed", 0),
            ("learning_rate", 0),
        ):
            value = getattr(self, name)
            if not _is_number(value) or value < least:
                raise ConfigError(f"{name} must be a number of at least {least}, found {value!r}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ConfigError(f"num_train_epochs must be positive, found {self.num_train_epochs}")
        if self.deepspeed:
            raise ConfigError(
                "deepspeed is not supported yet; use plain data parallelism, "
                "`accelerate launch --multi_gpu ...`"
            )
        optim = str(getattr(self.optim, "value", self.optim))
        if _is_of_bitsandbytes(optim) and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"optim: {optim} needs bitsandbytes (pip install bitsandbytes); adamw_torch does "
                "not"
            )
        if self.load_best_model_at_end and str(self.eval_strategy) in ("no", "IntervalStrategy.NO"):
            raise ConfigError(
                "load_best_model_at_end needs evaluations to choose by; set eval_strategy"
            )

    def _check_data_settings(self) -> None:
        choices = {
            "nll_tokens": ("prompt_and_completion", "completion"),
            "overlong_rows": ("drop", "cut_prompt"),
            "on_bad_row": ("drop", "error"),
            "prefix_sharing": ("auto", "on", "off"),
            "tree_attention": ("sdpa", "varlen"),
        }
        sharing: Any = self.prefix_sharing
        if isinstance(sharing, bool):  # what YAML 1.1 makes of a bare on or off
            self.prefix_sharing = "on" if sharing else "off"
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be {' or '.join(allowed)}, found {getattr(self, name)!r}"
                )
        tokens: Any = self.max_tokens_per_row
        if tokens != "auto" and not (_is_number(tokens) and tokens >= 2):
            raise ConfigError(f"max_tokens_per_row must be at least 2, or auto, found {tokens!r}")
        if self.max_length is not None and (not _is_number(self.max_length) or self.max_length < 2):
            raise ConfigError(f"max_length must be at least 2 or null, found {self.max_length!r}")
        if self.loss_workspace_mib < 1:
            raise ConfigError(
                f"loss_workspace_mib must be at least 1, found {self.loss_workspace_mib}"
            )

    def _resolve_precision(self) -> None:
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        has_gpu = on_cuda or torch.backends.mps.is_available()
        if self.bf16 and not has_gpu and not self.use_cpu:
            raise ConfigError(
                "bf16: there is no GPU here; leave it unset, or set use_cpu: true for (slow) "
                "bf16 on the CPU"
            )
        if self.fp16 and not has_gpu:
            raise ConfigError("fp16 needs a GPU; leave it unset")
        if self.bf16 is None:
            self.bf16 = on_cuda and not self.fp16 and gpu_has_bf16()
        if self.fp16 is None:
            self.fp16 = on_cuda and not self.bf16 and not gpu_has_bf16()

    def _resolve_activation_checkpointing(self) -> None:
        # transformers 5.2x renamed gradient_checkpointing; either name is taken, and no
        # deprecation warning for the one that everybody writes.
        known = {f.name for f in fields(TrainingArguments)}
        renames = {
            "gradient_checkpointing": "activation_checkpointing",
            "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
        }
        current = "gradient_checkpointing"
        if "activation_checkpointing" in known:
            current = "activation_checkpointing"
            for old, new in renames.items():
                if getattr(self, new) is None and getattr(self, old) is not None:
                    setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        if getattr(self, current) is None:
            has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
            setattr(self, current, has_gpu and not self.use_cpu)
