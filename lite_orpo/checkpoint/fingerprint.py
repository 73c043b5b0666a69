"""What a run is made of, in short: a checkpoint goes on only with the same.

Base weights, data, adapter, chat template, loss settings, the make-up of a step and the optimiser.
Weights are sampled, tokens are hashed whole. Versions are noted too; a difference there is only
told.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses.objective import Objective
from ..model.head import innermost_causal_lm
from ..model.host_memory import host_weight
from .optimizer_settings import Change, optimizer_kind, optimizer_settings

FINGERPRINT_FILE = "fingerprint.json"
_SETTINGS, _VERSIONS = "optimizer settings", "versions"  # noted, and may change
_COLUMNS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
_NOT_NOTED = "not noted"
_SAMPLED = 256  # values of each weight
_PACKAGES = ("lite-orpo", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
# Of an adapter's settings, where it came from and what it is used for now are not what it is.
_NOT_THE_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def fingerprint_of(trainer: Any) -> dict[str, Any]:
    """The fingerprint of a run before its first step.

    Args:
        trainer: with its model on the device and its data prepared; of a model that trains in
            full, with the weights that it begins with.

    Returns:
        Each part's name and a digest or its settings.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    return {
        "base weights": weights_digest(trainer.model),
        "data": data_digest(trainer.train_dataset),
        "adapter": _adapters(trainer.model),
        "chat template": _digest([str(tokenizer.chat_template).encode()]),
        "loss settings": {
            **Objective.of(args).settings(),
            "nll_tokens": args.nll_tokens,
        },
        "pairs of a step": {
            "pairs": args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "order": str(args.train_sampling_strategy),
            "drop_last": args.dataloader_drop_last,
        },
        "optimizer": optimizer_kind(args, trainer.given_optimizer),
        _SETTINGS: optimizer_settings(args, trainer.given_optimizer),
        _VERSIONS: _versions(),
    }


class Differences(NamedTuple):
    """In what a checkpoint's run and this one differ."""

    parts: list[str]
    """Parts that may not differ, each with its settings that do."""
    versions: list[str]
    """Such as "torch 2.11 there, 2.13 here"."""
    settings: dict[str, Change]
    """Of the optimiser: by name the value there and the one here."""


def differences(checkpoint: Path, own: dict[str, Any]) -> Differences:
    """Compare a checkpoint's fingerprint with a run's.

    Args:
        checkpoint: a complete one.
        own: the run's.
    """
    try:
        text = (checkpoint / FINGERPRINT_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Differences(["everything (it has no fingerprint)"], [], {})
    theirs = json.loads(text)
    own = json.loads(json.dumps(own))  # as it is read back: tuples are lists
    parts = [
        name + _which(theirs.get(name), own[name])
        for name in own
        if name not in (_SETTINGS, _VERSIONS) and theirs.get(name) != own[name]
    ]
    there, here = theirs.get(_VERSIONS, {}), own[_VERSIONS]
    versions = [
        f"{name} {there.get(name)} there, {here[name]} here"
        for name in here
        if there.get(name) != here[name]
    ]
    there, here = theirs.get(_SETTINGS, {}), own[_SETTINGS]
    settings = {k: (there[k], here[k]) for k in here if k in there and there[k] != here[k]}
    return Differences(parts, versions, settings)


def _which(there: Any, here: Any) -> str:
    """The settings of a part that differ, where it has any that can be read in a line."""
    if there is None:
        return " (not noted there)"
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return ""
    unlike = [key for key in here if there.get(key, _NOT_NOTED) != here[key]]
    told = [
        f"{key} {there.get(key, _NOT_NOTED)} there, {here[key]} here"
        for key in unlike
        if not isinstance(here[key], (dict, list))
    ]
    return f" ({'; '.join(told)})" if told else ""


def write_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write it into a checkpoint's folder."""
    text = json.dumps(fingerprint, indent=1, sort_keys=True)
    (folder / FINGERPRINT_FILE).write_text(text + "\n", encoding="utf-8")


def weights_digest(model: nn.Module) -> str:
    """Digest of the weights under an adapter; of all, where none is. Sampled."""
    has_adapter = hasattr(model, "peft_config")

    weights: dict[str, Tensor] = {
        name: weight
        for name, weight in model.named_parameters()
        if not (has_adapter and weight.requires_grad)
    }
    on_host = host_weight(model)
    if on_host is not None:  # under the name that it has on the device
        embedding = innermost_causal_lm(model).get_input_embeddings()
        (name,) = [name for name, module in model.named_modules() if module is embedding]
        weights[f"{name}.weight"] = on_host
    return _digest(part for name in sorted(weights) for part in _sample(name, weights[name]))


def _sample(name: str, weight: Tensor) -> Iterator[bytes]:
    flat = weight.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLED, 1)
    yield f"{name} {tuple(weight.shape)} {weight.dtype}".encode()
    yield flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def data_digest(dataset: Any) -> str:
    """Digest of all token ids of a prepared data set."""
    return _digest(_arrow_parts(dataset) if hasattr(dataset, "with_format") else _parts(dataset))


def _arrow_parts(dataset: Any) -> Iterator[bytes]:
    from pyarrow import compute

    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for column in _COLUMNS:
            lists = table[column].combine_chunks()
            for numbers in (compute.list_value_length(lists), lists.flatten()):
                yield numbers.to_numpy(zero_copy_only=False).tobytes()


def _parts(rows: Any) -> Iterator[bytes]:
    for row in rows:
        for column in _COLUMNS:
            yield torch.tensor([len(row[column]), *row[column]]).numpy().tobytes()


def _adapters(model: Any) -> dict[str, Any]:
    return {
        str(name): {
            key: _plain(value)
            for key, value in config.to_dict().items()
            if key not in _NOT_THE_ADAPTER
        }
        for name, config in getattr(model, "peft_config", {}).items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
