"""A whole run's configuration: YAML file + overrides -> checked, typed options.

Knows every key there is (training arguments and the groups of `options.py`), so an unknown one
is answered with the nearest name.
"""

import dataclasses
import difflib
import enum
import logging
import typing
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, UserError
from ..public_names import public_values
from .coercion import coerce
from .legacy_names import KEPT_NAMES, as_one_line, translate_settings
from .options import (
    OPTION_GROUPS,
    SECRET_KEYS,
    DataOptions,
    LoraOptions,
    ModelOptions,
    ReportOptions,
)
from .orpo_config import ORPOConfig
from .yaml_file import Setting, read_settings

logger = logging.getLogger(__name__)

_RESOLVED_BY_US = {"local_rank", "deepspeed_plugin", "distributed_state", "mixed_precision"}


class RunConfig(NamedTuple):
    """All that a run is told."""

    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    report: ReportOptions
    training: ORPOConfig
    given: dict[str, Any]
    """The keys that the file and the overrides set, as they were resolved."""

    def as_settings(self) -> dict[str, Any]:
        """Flat settings that reproduce this run: every option, and each argument that was set.

        Without tokens; of absolute paths only their last part (see `public_names.py`).
        """
        settings: dict[str, Any] = {}
        for group in (self.model, self.lora, self.data, self.report):
            settings.update(dataclasses.asdict(group))
        ours = {f.name for f in dataclasses.fields(ORPOConfig)} - _inherited_names()
        for name in sorted(ours | {"learning_rate", "logging_steps", "output_dir", "seed"}):
            settings[name] = getattr(self.training, name)
        settings.update({k: v for k, v in self.given.items() if k not in SECRET_KEYS})
        args = self.training
        if args.beta is None and args.orpo_alpha is None and args.loss_type != "sft":
            name = "beta" if args.orpo_beta is None else "orpo_alpha"
            settings[name] = args.preference_beta
        plain = {k: v.value if isinstance(v, enum.Enum) else v for k, v in settings.items()}
        return {key: public_values(value) for key, value in plain.items()}


def _inherited_names() -> set[str]:
    from transformers import TrainingArguments

    return {f.name for f in dataclasses.fields(TrainingArguments)}


def load_run_config(
    path: Path, overrides: dict[str, Setting], *, tells_of_old_names: bool = True
) -> RunConfig:
    """Read a configuration and apply overrides.

    Args:
        path: the YAML file.
        overrides: settings that replace the file's, each with where it was given.
        tells_of_old_names: warn of names that were translated; once a command is enough.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or settings that contradict
            each other.
    """
    written, notes = translate_settings(read_settings(path))
    over, notes_over = translate_settings(overrides)
    if tells_of_old_names and notes + notes_over:
        logger.warning("%s: %s", path, as_one_line(notes + notes_over))
    return run_config_of({**written, **over}, path)


def run_config_of(settings: dict[str, Setting], path: Path) -> RunConfig:
    """The same, of settings that have been read already.

    Args:
        settings: each key's value and where it was given.
        path: what messages without a place of their own name.

    Raises:
        ConfigError: as `load_run_config`.
    """
    groups = (*OPTION_GROUPS, ORPOConfig)
    hints = {group: _settable_hints(group) for group in groups}
    known = {name for group_hints in hints.values() for name in group_hints}
    kept = {k: settings.pop(k) for k in KEPT_NAMES if k in settings and k not in known}
    chosen: dict[type[Any], dict[str, Any]] = {group: {} for group in groups}
    for key, setting in settings.items():
        if key not in known:
            raise ConfigError(_unknown_key(key, setting.where, known))
        for group in groups:
            if key in hints[group]:
                chosen[group][key] = coerce(key, setting.value, hints[group][key], setting.where)
    training = _build_training_arguments(chosen[ORPOConfig], path)
    given = {k: v for values in chosen.values() for k, v in values.items()}
    for key, setting in kept.items():
        given[key] = coerce(key, setting.value, str | None, setting.where)
        setattr(training, key, given[key])
    model, lora, data, report = (group(**chosen[group]) for group in OPTION_GROUPS)
    if report.sample_prompts < 0 or report.sample_max_new_tokens < 1:
        raise ConfigError(
            f"{path}: sample_prompts must be at least 0 and sample_max_new_tokens at least 1"
        )
    if report.sample_at_evaluations and not (
        report.sample_prompts and training.eval_strategy != "no"
    ):
        raise ConfigError(
            f"{path}: sample_at_evaluations needs sample_prompts above 0 and evaluations "
            "(eval_strategy: epoch or steps)"
        )
    return RunConfig(model, lora, data, report, training, given)


def _settable_hints(group: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(group)
    # `true` is the newest checkpoint of output_dir, as in Trainer.train.
    hints["resume_from_checkpoint"] = str | bool | None
    # `on` and `off` are booleans in YAML 1.1.
    hints["prefix_sharing"] = str | bool
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(group)
        if f.init and f.name not in _RESOLVED_BY_US
    }


def _unknown_key(key: str, where: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    hint = (
        f"did you mean {nearest[0]}?"
        if nearest
        else "`lite-orpo init` writes a file with the usual keys"
    )
    return f"{where}: unknown key {key}; {hint}"


def _build_training_arguments(values: dict[str, Any], path: Path) -> ORPOConfig:
    try:
        return ORPOConfig(**values)
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, ImportError, NotImplementedError) as error:
        # transformers checks its own arguments; what it says is about a value in this file.
        raise ConfigError(f"{path}: {error}") from None
