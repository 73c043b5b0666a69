"""Nested states (an optimiser's, a scheduler's, random ones) as safetensors and JSON, no pickle.

The JSON has the shape of the state and its plain values, the safetensors file its tensors. What
is neither is refused by name: nothing of a state is left out silently.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError

_ENDINGS = (".json", ".safetensors")


def save_tree(tree: Any, stem: Path) -> None:
    """Write a state to `<stem>.json` and `<stem>.safetensors`.

    Args:
        tree: dicts with str or int keys, lists, tuples, tensors, NumPy arrays, numbers, strings,
            booleans and None, nested at will.
        stem: path without an ending.

    Raises:
        CheckpointError: something of another type is in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    shape = _encoded(tree, tensors)
    save_file(tensors, f"{stem}{_ENDINGS[1]}")
    Path(f"{stem}{_ENDINGS[0]}").write_text(json.dumps(shape), encoding="utf-8")


def load_tree(stem: Path) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """
    shape = json.loads(Path(f"{stem}{_ENDINGS[0]}").read_text(encoding="utf-8"))
    return _decoded(shape, load_file(f"{stem}{_ENDINGS[1]}"))


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):  # JSON has no word for what is not finite
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, numpy.generic):
        return _encoded(value.item(), tensors)
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        name, kind = str(len(tensors)), "tensor"
        if isinstance(value, numpy.ndarray):
            value, kind = torch.from_numpy(value), "array"
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {kind: name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(f"a state's key is {key!r}, a {type(key).__name__}")
        return {"dict": [[key, _encoded(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        entries = [_encoded(entry, tensors) for entry in value]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    raise CheckpointError(f"a state holds a {type(value).__name__}, which has no form in JSON")


def _decoded(shape: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(shape, list):
        return [_decoded(entry, tensors) for entry in shape]
    if not isinstance(shape, dict):
        return shape
    ((kind, content),) = shape.items()
    if kind == "dict":
        return {key: _decoded(entry, tensors) for key, entry in content}
    if kind == "tuple":
        return tuple(_decoded(entry, tensors) for entry in content)
    if kind == "float":
        return float(content)
    return tensors[content].numpy() if kind == "array" else tensors[content]
