"""Public: log-probabilities of target tokens straight from hidden states and an LM head.

Here are the argument checks and the choice of backend; the arithmetic is in the backends' own
files (`reference.py` eager, `chunked.py` PyTorch in bounded memory, `fused_logprobs.py` Triton).
"""

import math

import torch
from torch import Tensor

from .backends import select_backend
from .filter_ops import filtered_logprobs
from .gradient_filter import GradientFilter
from .head import HeadTransform
from .head_ops import Settings, differentiable_logprobs
from .reference import linear_logprobs_reference

DEFAULT_WORKSPACE_BYTES = 64 * 2**20


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    gradient_filter: GradientFilter | None = None,
) -> Tensor:
    """Log-probability of every target token, without the logits tensor.

    log p(target) under softmax(transform(hidden @ weight.T + bias)), where transform multiplies
    by `logit_scale` and then applies `softcap * tanh(z / softcap)`. Computed as -softplus(r - z)
    with r the logsumexp of all *other* logits, so it keeps relative accuracy as p -> 1.
    Differentiable once, with respect to every floating-point tensor; with a frozen head forward
    and backward take two GEMMs together, without gradients one. Honours autocast like
    `torch.nn.functional.linear`, and is one node to torch.compile.

    Args:
        hidden: [..., D] hidden states, fp32, bf16, fp16 or fp64; need not be contiguous.
        weight: [V, D] LM head in the dtype of `hidden`.
        targets: [...] int64 token ids in [0, V), or `ignore_index`.
        bias: [V] or None.
        low_rank: (rows [..., r], head [V, r]): rows @ head.T is added to the logits before the
            transform, as a LoRA on the head does with rows = scaling * dropout(hidden) @ A.T and
            head = B. The sum of the two heads is never made.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's scaling).
        softcap: Gemma 2's final soft-cap, or None.
        ignore_index: rows with this target return 0.0, get no gradient, and are left out
            before the matrix product. Finding them waits for the device once; None says that
            there are none, and nothing waits.
        backend: "auto", "triton", "chunked" or "reference"; see `select_backend`.
        workspace_bytes: bound on the temporaries, beside a few [rows, D].
        gradient_filter: leave out blocks of the vocabulary without mass from the gradient of
            `hidden` and say by how much at most it is wrong; the log-probabilities stay exact.
            Triton, a frozen head without soft-cap and low_rank; None: exact.

    Returns:
        Log-probabilities shaped like `targets`, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit each other.
        IndexError: a target on the CPU lies outside [0, V). On other devices this is not looked
            at, since it would wait for the device; with Triton the result there is NaN.
        ModuleNotFoundError: `backend="triton"` where Triton is not installed.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        if low_rank is not None:
            low_rank = _autocast(low_rank[0], dtype), _autocast(low_rank[1], dtype)
    _check(hidden, weight, targets, bias, low_rank, softcap, workspace_bytes)
    chosen = select_backend(hidden.device, backend, hidden.dtype)
    transform = HeadTransform(float(logit_scale), None if softcap is None else float(softcap))
    extra_head = None if low_rank is None else low_rank[1]
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden if low_rank is None else torch.cat([hidden, low_rank[0]], dim=-1)
        rows = rows.reshape(-1, rows.shape[-1])
        flat_targets = targets.reshape(-1)
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(flat_targets, weight.shape[0], ignore_index)
        if chosen.name == "reference":
            logps = linear_logprobs_reference(
                rows,
                weight if extra_head is None else torch.cat([weight, extra_head], dim=1),
                flat_targets,
                bias=bias,
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
            )
        else:
            settings = Settings(transform, ignore_index, chosen.name, workspace_bytes)
            if gradient_filter is None or not (torch.is_grad_enabled() and hidden.requires_grad):
                logps = differentiable_logprobs(
                    rows, weight, extra_head, bias, flat_targets, settings
                )
            elif extra_head is not None:
                raise ValueError("gradient_filter does not go with low_rank; leave it out")
            else:
                logps = filtered_logprobs(
                    rows, weight, bias, flat_targets, gradient_filter, settings
                )
    return logps.reshape(targets.shape)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch does: fp64 and integers are left alone.
    is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_cast else tensor


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    workspace_bytes: int,
) -> None:
    if weight.ndim == 2 and 0 in weight.shape:
        raise ValueError(f"weight [V, D] is empty: {tuple(weight.shape)}")
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
    extra_rows, extra_head = (None, None) if low_rank is None else low_rank
    parts = [("weight", weight), ("bias", bias)]
    parts += [("low_rank[0]", extra_rows), ("low_rank[1]", extra_head)]
    for name, tensor in parts:
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but hidden is {hidden.dtype}; cast one of them "
                "or use torch.autocast"
            )
    for name, tensor in (*parts, ("targets", targets)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], found {tuple(bias.shape)}")
    if extra_rows is not None and extra_head is not None:
        rank = extra_rows.shape[-1] if extra_rows.ndim else 0
        fits = extra_rows.shape[:-1] == targets.shape and extra_rows.ndim == hidden.ndim
        if not fits or extra_head.shape != (weight.shape[0], rank):
            raise ValueError(
                f"low_rank must be rows [..., r] like hidden and a head [V, r]: "
                f"{tuple(extra_rows.shape)} and {tuple(extra_head.shape)}"
            )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, found {softcap}")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, found {workspace_bytes}")


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    is_outside = (targets < 0) | (targets >= vocabulary)
    if ignore_index is not None:
        is_outside &= targets != ignore_index
    if bool(is_outside.any()):
        raise IndexError(
            f"target {int(targets[is_outside][0])} lies outside [0, {vocabulary}) and is not "
            f"ignore_index ({ignore_index})"
        )
