"""What becomes of an argument that earlier transformers, TRL or the course's notebooks know.

One table, old name -> what is done with it, and a pure function over it. Nothing is dropped in
silence: a name is renamed, kept for the trainer, or said to have no effect here; a value that
cannot be honoured is refused. No torch here: `lite-orpo check` reads the same table.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

from ..errors import ConfigError
from .options import OPTION_GROUPS
from .yaml_file import Setting


class Translation(NamedTuple):
    """Settings under the names of today."""

    settings: dict[str, Any]
    kept: dict[str, Any]
    """What is no argument of a run but is used by the trainer (`KEPT_NAMES`)."""
    notes: list[str]
    """For each old name, what it is now."""


class _Renamed(NamedTuple):
    new: str
    convert: Callable[[Any], Any] = lambda value: value
    """The new value; None leaves the new argument at its default. Raises ValueError, with why."""
    yields: bool = False
    """Whether the new argument may be given too, and then counts."""
    note: str = ""


class _WithoutEffect(NamedTuple):
    note: str
    allowed: tuple[Any, ...] | None = None
    """The values that ask for what happens anyway; None: all do."""
    remedy: str = ""


class _Kept(NamedTuple):
    note: str


def _warmup_share(ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError("must be a share of the steps, at least 0 and below 1")
    return float(ratio)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _prompt_length(tokens: Any) -> str:
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not tokens > 0:
        raise ValueError("must be a positive number of tokens")
    return "cut_prompt"


def _chosen_if(value: Any, name: str) -> str | None:
    return name if _truth(value) else None


_OFF: tuple[Any, ...] = (None, False, 0, "", -1)
_NO_LABELS = "pairs are collated without padded labels"

_TABLE: dict[str, _Renamed | _WithoutEffect | _Kept] = {
    # transformers before 5
    "evaluation_strategy": _Renamed("eval_strategy"),
    "warmup_ratio": _Renamed(
        "warmup_steps", _warmup_share, note="below 1 it is a share of the steps"
    ),
    "group_by_length": _Renamed(
        "train_sampling_strategy", lambda value: "group_by_length" if _truth(value) else "random"
    ),
    "no_cuda": _Renamed("use_cpu", _truth),
    "adafactor": _Renamed("optim", lambda value: _chosen_if(value, "adafactor")),
    "per_gpu_train_batch_size": _Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _Renamed("per_device_eval_batch_size"),
    "push_to_hub_token": _Renamed("hub_token"),
    "push_to_hub_model_id": _Renamed("hub_model_id"),
    "torchdynamo": _Renamed("torch_compile_backend"),
    "xpu_backend": _Renamed("ddp_backend"),
    "use_mps_device": _WithoutEffect("the device is found by itself (use_cpu=True stays off it)"),
    "logging_dir": _Kept("TensorBoard's folder in this run"),
    "overwrite_output_dir": _WithoutEffect("later checkpoints of an earlier run are set aside"),
    "save_safetensors": _WithoutEffect(
        "weights are always saved so", (None, True), "files are always safetensors; leave it out"
    ),
    "fp16_backend": _WithoutEffect(
        "it is always PyTorch's", (None, "auto", "amp", "cuda_amp", "cpu_amp"), "leave it out"
    ),
    "half_precision_backend": _WithoutEffect(
        "it is always PyTorch's", (None, "auto", "amp", "cuda_amp", "cpu_amp"), "leave it out"
    ),
    "fp16_opt_level": _WithoutEffect("it was Apex's"),
    "ray_scope": _WithoutEffect("no search by Ray here"),
    "include_tokens_per_second": _WithoutEffect("every log line has lite_orpo/tokens_per_second"),
    "include_inputs_for_metrics": _WithoutEffect("off", _OFF, "no logits are made; leave it out"),
    "jit_mode_eval": _WithoutEffect("off", _OFF, "there is no such mode; leave it out"),
    "use_ipex": _WithoutEffect("off", _OFF, "there is no such mode; leave it out"),
    "tpu_num_cores": _WithoutEffect("off", _OFF, "TPUs are not supported; leave it out"),
    "tpu_metrics_debug": _WithoutEffect("off", _OFF, "TPUs are not supported; leave it out"),
    "past_index": _WithoutEffect("off", _OFF, "models that hand on a past are not supported"),
    "use_legacy_prediction_loop": _WithoutEffect("off", _OFF, "there is one loop; leave it out"),
    "mp_parameters": _WithoutEffect("off", _OFF, "SageMaker's sharding is not supported"),
    "sharded_ddp": _WithoutEffect("off", _OFF, "set fsdp_config, with version: 2"),
    "fsdp_min_num_params": _WithoutEffect("off", _OFF, "set fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": _WithoutEffect("off", _OFF, "set fsdp_config"),
    "dispatch_batches": _WithoutEffect("off", _OFF, "set accelerator_config"),
    "split_batches": _WithoutEffect("off", _OFF, "set accelerator_config"),
    "push_to_hub_organization": _WithoutEffect("off", _OFF, "set hub_model_id='organisation/name'"),
    # TRL's ORPOConfig, of 1.16 and before
    "max_prompt_length": _Renamed(
        "overlong_rows",
        _prompt_length,
        yields=True,
        note="rows over max_length lose the prompt's oldest tokens, completions are never cut",
    ),
    "max_completion_length": _WithoutEffect("completions are never cut; max_length is of the row"),
    "label_pad_token_id": _WithoutEffect(_NO_LABELS),
    "padding_value": _WithoutEffect("what fills a row is masked and never scored"),
    "truncation_mode": _WithoutEffect(
        "the end of a prompt is what is kept", (None, "keep_end"),
        "the end of a prompt is kept; leave it out, or shorten the prompts in the data",
    ),
    "generate_during_eval": _WithoutEffect(
        "off", _OFF, "`lite-orpo train` shows samples (sample_prompts); leave it out"
    ),
    "is_encoder_decoder": _WithoutEffect(
        "off", _OFF, "only decoder-only causal language models are trained"
    ),
    "dataset_num_proc": _WithoutEffect("rows are tokenised in one process"),
    "label_smoothing": _WithoutEffect("off", _OFF, "it is not part of ORPO's loss; leave it out"),
    "model_init_kwargs": _Kept("used where the model is given by name"),
    "trust_remote_code": _Kept("used where the model is given by name"),
    # the notebooks
    "model_name_or_path": _Kept("used where ORPOTrainer gets no model"),
}  # fmt: skip

LEGACY_NAMES = frozenset(_TABLE)
KEPT_NAMES = tuple(name for name, change in _TABLE.items() if isinstance(change, _Kept))


def translate(settings: Mapping[str, Any], where: Mapping[str, str] | None = None) -> Translation:
    """Put settings under the names of today.

    Args:
        settings: values by name, old and new.
        where: for names that were read from a file, where they stand there.

    Returns:
        The settings that are left, what is kept aside, and one note for each old name. Names
        that are not in the table are as they were.

    Raises:
        ConfigError: an old name together with its new one, or a value that cannot be honoured.
    """
    done = Translation({k: v for k, v in settings.items() if k not in _TABLE}, {}, [])
    came_from: dict[str, str] = {}
    for name, value in settings.items():
        change = _TABLE.get(name)
        place = f"{where[name]}: " if where and name in where else ""
        if isinstance(change, _Kept):
            done.kept[name] = value
            done.notes.append(f"{name} is kept ({change.note})")
        elif isinstance(change, _WithoutEffect):
            if change.allowed is not None and value not in change.allowed:
                raise ConfigError(f"{place}{name}={value!r} cannot be had: {change.remedy}")
            done.notes.append(f"{name} has no effect here ({change.note})")
        elif change is not None:
            _rename(done, name, value, change, came_from, place)
    return done


def _rename(
    done: Translation,
    name: str,
    value: Any,
    change: _Renamed,
    came_from: dict[str, str],
    place: str,
) -> None:
    new = change.new
    extra = f" ({change.note})" if change.note else ""
    if new in done.settings:
        if change.yields and new not in came_from:
            done.notes.append(f"{name} gives way to {new}")
            return
        other = came_from.get(new, new)
        raise ConfigError(
            f"{place}{name} is today's {new}, and {other} is given too; give {new} alone"
        )
    try:
        now = None if value is None else change.convert(value)
    except ValueError as error:
        raise ConfigError(f"{place}{name} {error}, found {value!r}") from None
    if now is not None:
        done.settings[new] = now
        came_from[new] = name
    shown = f"{new}={now!r}" if now is not None and now != value else new
    done.notes.append(f"{name} is {shown}{extra}")


def translate_settings(settings: dict[str, Setting]) -> tuple[dict[str, Setting], list[str]]:
    """The same for what was read from a file or the command line, with where it stands.

    Names that are keys of a run's options (`options.py`) are no old names there.

    Raises:
        ConfigError: as `translate`; or what only a call in Python can have.
    """
    options = {f.name for group in OPTION_GROUPS for f in fields(group)}
    old = {k: s.value for k, s in settings.items() if k in _TABLE and k not in options}
    if not old:
        return settings, []
    if "model_init_kwargs" in old:
        raise ConfigError(
            f"{settings['model_init_kwargs'].where}: model_init_kwargs is for Python; "
            "here dtype, attn_implementation and model_revision are keys of their own"
        )
    places = {name: setting.where for name, setting in settings.items()}
    others = {k: s.value for k, s in settings.items() if k not in old and k not in _TABLE}
    done = translate({**others, **old}, places)
    result = {k: s for k, s in settings.items() if k not in old}
    for name in old:
        change = _TABLE[name]
        if isinstance(change, _Kept):
            result[name] = settings[name]
        elif isinstance(change, _Renamed) and change.new in done.settings:
            result.setdefault(change.new, Setting(done.settings[change.new], places[name]))
    return result, done.notes


def as_one_line(notes: list[str]) -> str:
    """The consolidated warning."""
    return f"names of earlier versions were translated: {'; '.join(notes)}"


Config = TypeVar("Config")


def takes_old_names(config: type[Config]) -> type[Config]:
    """Let a dataclass of arguments be made with old names too, with one warning (UserWarning).

    What is kept (`KEPT_NAMES`) becomes a plain attribute, which no file is written from.
    """
    make: Callable[..., None] = vars(config)["__init__"]

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if LEGACY_NAMES.isdisjoint(kwargs):
            make(self, *args, **kwargs)
            return
        settings, kept, notes = translate(kwargs)
        make(self, *args, **settings)
        for name, value in kept.items():
            setattr(self, name, value)
        warnings.warn(f"{config.__name__}: {as_one_line(notes)}", stacklevel=2)

    setattr(config, "__init__", __init__)  # noqa: B010 (which a type checker lets nobody assign)
    return config


def kept(args: Any, name: str) -> Any:
    """What was given under one of `KEPT_NAMES`, else None."""
    assert name in KEPT_NAMES
    return getattr(args, name, None)
