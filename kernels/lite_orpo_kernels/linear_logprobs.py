"""Public: log-probabilities of target tokens straight from hidden states and an LM head.

Here are the argument checks and the choice of backend; the arithmetic is in the backends'
own files (`reference.py` eager, `chunked.py` bounded memory).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import HeadTransform, chunked_logprobs
from .reference import linear_logprobs_reference

DEFAULT_WORKSPACE_BYTES = 64 * 2**20
BACKENDS = ("auto", "chunked", "reference")


class Backend(NamedTuple):
    """The backend that would run, and why."""

    name: str
    reason: str


def select_backend(device: torch.device | str, backend: str = "auto") -> Backend:
    """Resolve `backend` for tensors on `device`.

    Args:
        device: where the hidden states live.
        backend: "auto", or the name of a backend to insist on.

    Returns:
        The backend's name and the reason for it, in words for a user.

    Raises:
        ValueError: the name is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return Backend(backend, "asked for")
    kind = torch.device(device).type
    return Backend("chunked", f"pure PyTorch in bounded memory; no Triton kernel for {kind} yet")


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Log-probability of every target token, without the logits tensor.

    log p(target) under softmax(transform(hidden @ weight.T + bias)), where transform multiplies
    by `logit_scale` and then applies `softcap * tanh(z / softcap)`. Computed as -softplus(r - z)
    with r the logsumexp of all *other* logits, so it keeps relative accuracy as p -> 1.
    Differentiable once, with respect to `hidden`, `weight` and `bias`; with a frozen head forward
    and backward take two GEMMs together. Honours autocast like `torch.nn.functional.linear`.

    Args:
        hidden: [..., D] hidden states, fp32, bf16, fp16 or fp64; need not be contiguous.
        weight: [V, D] LM head in the dtype of `hidden`.
        targets: [...] int64 token ids in [0, V), or `ignore_index`.
        bias: [V] or None.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's scaling).
        softcap: Gemma 2's final soft-cap, or None.
        ignore_index: rows with this target return 0.0, get no gradient, and are left out
            before the matrix product. Finding them waits for the device once.
        backend: "auto", "chunked" or "reference".
        workspace_bytes: bound on the temporaries of the chunked backend, beside a few [rows, D].

    Returns:
        Log-probabilities shaped like `targets`, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit each other.
        IndexError: a target on the CPU lies outside [0, V). On other devices this is not looked
            at, since it would wait for the device.
    """
    chosen = select_backend(hidden.device, backend)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    _check(hidden, weight, targets, bias, softcap, workspace_bytes)
    flat_targets = targets.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    keep = (flat_targets != ignore_index).nonzero().squeeze(1)
    every_row_is_scored = keep.numel() == flat_targets.numel()
    kept_targets = flat_targets if every_row_is_scored else flat_targets[keep]
    rows = rows if every_row_is_scored else rows[keep]
    if hidden.device.type == "cpu" and kept_targets.numel():
        _check_range(kept_targets, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen.name == "reference":
            logps = linear_logprobs_reference(
                rows, weight, kept_targets, bias=bias, logit_scale=logit_scale, softcap=softcap
            )
        else:
            transform = HeadTransform(float(logit_scale), softcap)
            logps = chunked_logprobs(rows, weight, bias, kept_targets, transform, workspace_bytes)
    if every_row_is_scored:
        return logps.reshape(targets.shape)
    out = torch.zeros(flat_targets.shape, dtype=logps.dtype, device=logps.device)
    return out.index_copy(0, keep, logps).reshape(targets.shape)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch does: fp64 and integers are left alone.
    is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_cast else tensor


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    workspace_bytes: int,
) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden [..., D] and weight [V, D] do not fit: {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be shaped like hidden without its last dimension: "
            f"{tuple(targets.shape)} against {tuple(hidden.shape[:-1])}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, found {targets.dtype}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, found {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but hidden is {hidden.dtype}; cast one of them "
                "or use torch.autocast"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("targets", targets)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], found {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, found {softcap}")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, found {workspace_bytes}")


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"target {low if low < 0 else high} lies outside [0, {vocabulary}) and is not "
            f"ignore_index ({ignore_index})"
        )
