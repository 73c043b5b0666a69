"""What is compared: the runs that `--loss-type orpo,dpo beta=0.05,0.1` stands for.

Everything that makes the comparison fair (pairs, their order, seed, steps, batch) is the same in
all of them, and cannot be varied.
"""

import itertools
import math
import re
from typing import Any, NamedTuple

from ..config.loss_types import LOSS_TYPES
from ..config.yaml_file import Setting, parse_value
from ..errors import ConfigError

_LOSS_SETTINGS = ("beta", "orpo_alpha", "orpo_beta", "simpo_gamma", "cpo_alpha")
VARIED = (
    "loss_type", *_LOSS_SETTINGS, "nll_tokens", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "optim", "lora_r", "lora_alpha", "lora_dropout", "use_rslora",
    "use_dora",
)  # fmt: skip
"""Keys that may have several values."""
MOST_VARIANTS = 32


class Variant(NamedTuple):
    """One run of a comparison."""

    name: str
    """Of its folder and in tables: `dpo, beta 0.1` without spaces and commas."""
    label: str
    overrides: dict[str, Any]
    """Settings that make it; None takes a setting of the configuration back."""


def split_values(key: str, value: Any) -> list[Any]:
    """The values that `key=a,b,c` or `key=[a,b,c]` gives to a key that may vary.

    Raises:
        ConfigError: one of them is empty, or given twice.
    """
    if isinstance(value, str):
        values = [parse_value(part) for part in value.split(",")]
    else:
        values = list(value) if isinstance(value, list) else [value]
    if not values or any(part is None for part in values):
        raise ConfigError(f"{key}: {value!r} has an empty value; write {key}=a,b,c")
    if len(set(map(str, values))) < len(values):
        raise ConfigError(f"{key}: {value!r} has a value twice")
    return values


def variants_of(
    settings: dict[str, Setting], overrides: dict[str, Setting]
) -> tuple[list[Variant], dict[str, Setting]]:
    """The runs to make.

    Settings of a loss that stand in the file belong to the file's own loss: another loss takes
    its own defaults, unless the command line says otherwise.

    Args:
        settings: of the configuration file.
        overrides: of the command line; keys in `VARIED` may have several values.

    Returns:
        The variants, each value of each key with each of the others, where the loss has that
        setting; and the overrides that are the same for all.

    Raises:
        ConfigError: there is nothing to compare, or something is varied that must not be.
    """
    own_loss = str(_value(settings, "loss_type") or "orpo")
    varied = {
        key: split_values(key, setting.value)
        for key, setting in overrides.items()
        if key in VARIED and (key in ("loss_type", *_LOSS_SETTINGS) or _is_several(setting.value))
    }
    same = {key: setting for key, setting in overrides.items() if key not in varied}
    _refuse_several(same)
    losses = [str(loss) for loss in varied.pop("loss_type", [own_loss])]
    for loss in losses:
        if loss not in LOSS_TYPES:
            raise ConfigError(f"loss_type must be of {', '.join(LOSS_TYPES)}; found {loss!r}")
    found: list[Variant] = []
    for loss in losses:
        own = {key: values for key, values in varied.items() if _has_setting(loss, key)}
        for values in itertools.product(*own.values()):
            chosen = dict(zip(own, values, strict=True))
            found.append(_variant(loss, own_loss, chosen, settings))
    for key in varied:
        if not any(_has_setting(loss, key) for loss in losses):
            raise ConfigError(f"{key} is a setting of none of these losses: {', '.join(losses)}")
    if len(found) < 2:
        raise ConfigError(
            "there is one run and nothing to compare it with; give several values, such as "
            "--loss-type orpo,dpo or beta=0.05,0.1,0.2"
        )
    if len(found) > MOST_VARIANTS:
        raise ConfigError(f"{len(found)} runs are more than {MOST_VARIANTS}; vary less at a time")
    return found, same


def _variant(
    loss: str, own_loss: str, chosen: dict[str, Any], settings: dict[str, Setting]
) -> Variant:
    overrides: dict[str, Any] = {"loss_type": loss}
    for key in (*_LOSS_SETTINGS, "nll_tokens"):
        is_foreign = loss != own_loss or key in _replaced_by(chosen)
        if key in settings and is_foreign:
            overrides[key] = None
    overrides |= chosen
    words = [f"{key} {_text(value)}" for key, value in chosen.items()]
    name = "-".join([loss, *(f"{key}{_text(value)}" for key, value in chosen.items())])
    label = f"{loss} ({', '.join(words)})" if words else loss
    return Variant(re.sub(r"[^\w.+-]", "_", name), label, overrides)


def _replaced_by(chosen: dict[str, Any]) -> tuple[str, ...]:
    # beta and orpo_alpha are two names of one thing, and refused together.
    if "beta" in chosen:
        return ("orpo_alpha", "orpo_beta")
    return ("beta",) if {"orpo_alpha", "orpo_beta"} & chosen.keys() else ()


def _has_setting(loss: str, key: str) -> bool:
    if key == "beta":
        return loss != "sft"
    owner = next((name for name, kind in LOSS_TYPES.items() if key in kind.own_settings), None)
    return owner is None or owner == loss


def _is_several(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and "," in value)


def _refuse_several(same: dict[str, Setting]) -> None:
    for key, setting in same.items():
        value = setting.value
        parts = value.split(",") if isinstance(value, str) else []
        if len(parts) > 1 and all(_is_number(part) for part in parts):
            raise ConfigError(
                f"{setting.where}: {key} cannot be varied: a comparison is on the same pairs, seed "
                f"and budget; what can is {', '.join(VARIED)}"
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(settings: dict[str, Setting], key: str) -> Any:
    return settings[key].value if key in settings else None
