"""What `lite-orpo check` looks at: data named on the command line, or by a configuration.

Of a configuration only the keys that say which data, which tokenizer and which lengths are read,
so that one for a GPU can be checked on a laptop, without torch's seconds.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any, NamedTuple

from ..config.coercion import coerce
from ..config.legacy_names import translate_settings
from ..config.options import DataOptions, ModelOptions
from ..config.yaml_file import Setting, parse_value, read_settings
from ..data.files.run_sources import Sources, open_run_sources
from ..data.preparation import LengthRule
from ..errors import ConfigError

DEFAULT_MAX_LENGTH = 1024  # ORPOConfig's, which takes seconds to import; a test compares them
_RULES = ("drop", "cut_prompt")
_BAD_ROW = ("drop", "error")


class CheckTarget(NamedTuple):
    """Which data, which tokenizer, and the rule for long rows."""

    data: DataOptions
    model: ModelOptions
    rule: LengthRule
    nll_tokens: str
    on_bad_row: str

    def open(self) -> Sources:
        """The pairs, and the held-out pairs where there are some, as `train` opens them.

        Raises:
            DataError: a file or data set cannot be opened.
        """
        return open_run_sources(self.data)


def resolve_target(
    name: str,
    *,
    held_out: str | None = None,
    model: str | None = None,
    max_length: int | None = None,
    overlong_rows: str | None = None,
    split: str | None = None,
    eval_split: str | None = None,
    column_mapping: str | None = None,
) -> CheckTarget:
    """Read a configuration if the name is one, and put the options over it.

    Args:
        name: a data set, or a .yaml file that names one in `dataset_name`.
        held_out: option --eval, and so on; None: not given.
        model: see `held_out`.
        max_length: see `held_out`.
        overlong_rows: see `held_out`.
        split: see `held_out`.
        eval_split: see `held_out`.
        column_mapping: see `held_out`; as YAML text.

    Raises:
        ConfigError: the configuration cannot be read or names no data, or an option is out of
            its range.
    """
    is_config = name.endswith((".yaml", ".yml"))
    settings = translate_settings(read_settings(Path(name)))[0] if is_config else {}
    where = "command line"
    options = {
        "dataset_name": None if is_config else name,
        "eval_dataset_name": held_out,
        "model_name_or_path": model,
        "max_length": max_length,
        "overlong_rows": overlong_rows,
        "dataset_train_split": split,
        "dataset_test_split": eval_split,
    }
    settings |= {key: Setting(v, where) for key, v in options.items() if v is not None}
    if column_mapping is not None:
        settings["column_mapping"] = Setting(parse_value(column_mapping), where)
    data = _group(DataOptions, settings)
    if data.dataset_name is None:
        raise ConfigError(f"{name}: dataset_name is not set; give a preference file or a hub name")
    rule = LengthRule(
        _get(settings, "max_length", int | None, DEFAULT_MAX_LENGTH),
        _get(settings, "overlong_rows", str, "drop"),
    )
    if rule.max_length is not None and rule.max_length < 2:
        raise ConfigError(f"max_length must be at least 2 or null, found {rule.max_length}")
    if rule.overlong_rows not in _RULES:
        raise ConfigError(
            f"overlong_rows must be {' or '.join(_RULES)}, found {rule.overlong_rows!r}"
        )
    nll_tokens = _get(settings, "nll_tokens", str, "prompt_and_completion")
    on_bad_row = _get(settings, "on_bad_row", str, "drop")
    if on_bad_row not in _BAD_ROW:
        raise ConfigError(f"on_bad_row must be {' or '.join(_BAD_ROW)}, found {on_bad_row!r}")
    return CheckTarget(data, _group(ModelOptions, settings), rule, nll_tokens, on_bad_row)


def _group(group: Any, settings: dict[str, Setting]) -> Any:
    hints = typing.get_type_hints(group)
    return group(
        **{
            field.name: _get(settings, field.name, hints[field.name], field.default)
            for field in dataclasses.fields(group)
        }
    )


def _get(settings: dict[str, Setting], key: str, hint: Any, default: Any) -> Any:
    if key not in settings:
        return default
    setting = settings[key]
    return coerce(key, setting.value, hint, setting.where)
