"""What `eval`, `chat` and `generate` look at: a run's folder, an adapter, a model, a configuration.

Of an adapter its base model is found by the run's configuration beside it, or by what the adapter
itself says. Nothing is loaded before everything that can be looked at without a model has been.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..allocator_failure import is_out_of_memory
from ..checkpoint.find import newest_complete
from ..config.options import ModelOptions
from ..config.run_config import RunConfig, run_config_of
from ..config.yaml_file import Setting, read_settings
from ..errors import ConfigError, HubError, ModelError
from ..model.load import load_model, load_tokenizer, loading
from ..model.quantization import keep_gradients_on_cpu
from .library_refusals import library_refusals
from .output_folder import CONFIG_FILE

_ADAPTER, _MODEL = "adapter_config.json", "config.json"
# Of a run's arguments only what says how pairs are read and scored: its schedule, its launcher
# and its reports are no part of looking at what came out.
_ARGUMENTS = (
    "beta", "orpo_alpha", "orpo_beta", "loss_type", "simpo_gamma", "cpo_alpha", "nll_tokens",
    "max_length", "overlong_rows", "on_bad_row", "prefix_sharing", "max_tokens_per_row",
    "tree_attention", "loss_backend", "loss_workspace_mib", "bf16", "fp16", "use_cpu", "seed",
)  # fmt: skip
_MODEL_AND_DATA = (
    "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "attn_implementation", "trust_remote_code", "chat_template_path",
    "dataset_name", "dataset_config", "dataset_train_split", "eval_dataset_name",
    "dataset_test_split", "column_mapping",
)  # fmt: skip


class Target(NamedTuple):
    """A model to look at."""

    name: str
    """As a person would call it: the folder's name, or the hub's."""
    folder: Path | None
    """Where it lies; None: on the hub."""
    adapter: str | None
    """Folder or hub name of the adapter; None: a whole model."""
    model: str
    """Folder or hub name of the base model, or of the whole one."""
    base: str | None
    """Of a whole model: what it was before training, where that is known."""
    tokenizer: str
    config: RunConfig
    base_named_in: str | None
    """The file that names the base model, where the command line does not."""


def resolve_target(name: str, base: str | None, overrides: dict[str, Setting]) -> Target:
    """Find out what a name on the command line stands for.

    Args:
        name: a folder, a hub name, or a .yaml configuration.
        base: option --base.
        overrides: settings from the command line.

    Raises:
        ConfigError: it is none of these, or no base model is known.
    """
    path = Path(name).expanduser()
    if name.endswith((".yaml", ".yml")):
        settings = read_settings(path)
        folder = Path(str(_value(settings, overrides, "output_dir") or "trainer_output"))
        if not _holds(folder):
            raise ConfigError(
                f"{path}: its output_dir, {folder}, holds nothing trained yet; "
                f"`lite-orpo train {path}` comes first"
            )
        return _local(folder, path, settings, base, overrides)
    if path.is_dir():
        if not _holds(path):
            raise ConfigError(_nothing_in(path))
        for folder in (path, path.parent) if path.name.startswith("checkpoint-") else (path,):
            if (folder / CONFIG_FILE).is_file():
                config = folder / CONFIG_FILE
                return _local(path, config, read_settings(config), base, overrides)
        return _local(path, None, {}, base, overrides)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        what = "is a file" if path.exists() else "no such folder"
        raise ConfigError(
            f"{name}: {what}; give a run's folder, an adapter, a model, or a configuration (.yaml)"
        )
    return _on_hub(name, base, overrides)


def load_target_tokenizer(target: Target) -> Any:
    """The tokenizer that was saved with it, or the base model's.

    Raises:
        ModelError: there is none.
        HubError: the hub does not give it.
    """
    options = target.config.model
    template = options.chat_template_path if target.tokenizer == target.model else None
    return load_tokenizer(options_for(target, target.tokenizer, template))


def load_target_model(target: Target, *, is_scored: bool) -> Any:
    """The model, with its adapter where it has one.

    Args:
        target: what to load.
        is_scored: a trainer is going to hold it, which wants weights that could train, in the
            dtype they would train in.

    Raises:
        ModelError: model or adapter cannot be loaded, or do not fit each other.
        HubError: the hub does not give them.
    """
    device = target.config.training.device
    options = options_for(target, target.model)
    trains_all = is_scored and target.adapter is None
    try:
        with library_refusals(Path(target.name), (ImportError, ValueError, RuntimeError)):
            model = load_model(options, device, trains_all_weights=trains_all)
    except (HubError, ModelError) as error:
        raise type(error)(f"{error}{_hint(target)}") from error
    if target.adapter is not None:
        model = _with_adapter(model, target.adapter, trains=is_scored)
    if not is_scored:
        if getattr(model, "hf_device_map", None) is None:
            model.to(device)
        # bitsandbytes' format for answering on CPUs fails where a layer's width is odd to it.
        keep_gradients_on_cpu(model)
        model.eval()
    return model


def _with_adapter(model: Any, adapter: str, *, trains: bool) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    with loading(adapter, "adapter"):
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=trains)
        except (RuntimeError, KeyError, TypeError, SafetensorError, EOFError) as error:
            if is_out_of_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ".join(lines[:2]) or type(error).__name__
            raise ModelError(
                f"{adapter}: the adapter does not fit the base model, or is damaged: {reason}"
            ) from error


def _local(
    folder: Path,
    config_path: Path | None,
    settings: dict[str, Setting],
    base: str | None,
    overrides: dict[str, Setting],
) -> Target:
    adapter, model = None, str(folder)
    trained_from = _value(settings, overrides, "model_name_or_path")
    named_in = str(config_path) if trained_from is not None else None
    if (folder / _ADAPTER).is_file():
        adapter = str(folder)
        if trained_from is None:
            trained_from, named_in = _base_of(folder), str(folder / _ADAPTER)
        if base is None and trained_from is None:
            raise ConfigError(f"{folder / _ADAPTER} names no base model; give --base")
        model = str(base or trained_from)
    before = None if adapter is not None else base or trained_from
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Target(
        folder.resolve().name,
        folder,
        adapter,
        model,
        None if before is None or Path(before).resolve() == folder.resolve() else str(before),
        str(folder) if has_tokenizer else model,
        _config(settings, overrides, model, config_path or folder),
        None if base is not None else named_in,
    )


def _on_hub(name: str, base: str | None, overrides: dict[str, Setting]) -> Target:
    from transformers.utils.peft_utils import find_adapter_config_file

    with loading(name, "model"):
        found = find_adapter_config_file(name)
    if found is None:
        return Target(
            name, None, None, name, base, name, _config({}, overrides, name, Path(name)), None
        )
    model = base or _base_of(Path(found).parent)
    if model is None:
        raise ConfigError(f"{name} names no base model; give --base")
    # An adapter's repository may have no tokenizer; the base always has.
    config = _config({}, overrides, model, Path(name))
    return Target(name, None, name, model, None, model, config, f"{name}'s {_ADAPTER}")


def _config(
    settings: dict[str, Setting], overrides: dict[str, Setting], model: str, path: Path
) -> RunConfig:
    kept = {k: v for k, v in settings.items() if k in (*_ARGUMENTS, *_MODEL_AND_DATA)}
    # Trainer makes the folder when it is built; that must not be a new one somewhere.
    fixed = {"model_name_or_path": model, "report_to": "none", "save_strategy": "no"}
    return run_config_of(
        kept | overrides | {key: Setting(value, "eval") for key, value in fixed.items()}, path
    )


def options_for(target: Target, name: str, template: str | None = None) -> ModelOptions:
    """How the target's model is loaded, for another name."""
    return dataclasses.replace(
        target.config.model, model_name_or_path=name, chat_template_path=template
    )


def _holds(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file() or (folder / _MODEL).is_file()


def _nothing_in(folder: Path) -> str:
    checkpoint = newest_complete(folder).checkpoint
    if checkpoint is not None:
        return f"{folder} holds no finished model; its newest checkpoint is {checkpoint}: give that"
    return f"{folder} has neither {_ADAPTER} nor {_MODEL}: it holds no adapter and no model"


def _base_of(folder: Path) -> str | None:
    path = folder / _ADAPTER
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    return str(found) if found else None


def _value(settings: dict[str, Setting], overrides: dict[str, Setting], key: str) -> Any:
    setting = overrides.get(key) or settings.get(key)
    return None if setting is None else setting.value


def _hint(target: Target) -> str:
    path = Path(target.model).expanduser()
    if target.base_named_in is None or path.is_absolute() or path.exists():
        return ""
    return (
        f" ({target.base_named_in} names it: a relative path counts from the folder where the "
        "training was started; or give --base)"
    )
