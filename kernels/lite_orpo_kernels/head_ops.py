"""The fused log-probabilities as operators and as one autograd Function.

Two operators are registered with torch, so that torch.compile sees each as one node and never
looks inside: a pass over the vocabulary that also makes the gradient's direction where the head
is frozen, and the gradients of a head that trains. The Function on top says what is saved and
how a backward pass scales it. Which backend computes is an argument; `reference` is no backend
here, torch differentiates it.

Legend: N rows as given, D hidden size (with the rank r of a low-rank addition), V vocabulary.
Rows whose target is ignored are left out before any product; their results are zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import chunked_head_gradients, chunked_rest_sums
from .head import Head, HeadGradients, HeadTransform, RestSums, Wanted, accumulation_dtype
from .launch_config import on_device
from .operators import register_operator


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is itself differentiated."""
    # Grad mode is on there only under create_graph=True. torch's once_differentiable would
    # let that pass, and drop the function's part of the second derivative silently.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused log-probabilities and losses are differentiable once; for second "
            'derivatives use backend="reference"'
        )


def scaled_direction(grad_logps: Tensor, miss: Tensor, direction: Tensor) -> Tensor:
    """Return the gradient [N, D] of a frozen head's rows, in the dtype of the direction."""
    # In fp32 and rounded once; but into a half-precision result, without an fp32 copy of it.
    scale = (grad_logps * miss).unsqueeze(1)
    return torch.mul(direction, scale, out=torch.empty_like(direction))


class Settings(NamedTuple):
    """What a call of the fused operators is told beside its tensors."""

    transform: HeadTransform
    ignore_index: int | None
    backend: str
    workspace_bytes: int


def kept_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices of the rows to score, or None for all of them; looking waits for the device."""
    if ignore_index is None:
        return None
    keep = (targets != ignore_index).nonzero().squeeze(1)
    return None if keep.numel() == targets.numel() else keep


def scattered(values: Tensor, keep: Tensor | None, count: int) -> Tensor:
    """Put the kept rows' values where they belong among `count` rows; zero for the others."""
    if keep is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, keep, values)


def _rest_sums(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    backend: str,
    workspace_bytes: int,
    want_direction: bool,
) -> RestSums:
    if rows.shape[0] == 0:
        nothing = rows.new_zeros(0, dtype=accumulation_dtype(rows.dtype))
        return RestSums(nothing, nothing.clone(), torch.empty_like(rows))
    if backend == "triton":
        from .fused_logprobs import triton_rest_sums

        with on_device(rows.device):
            return triton_rest_sums(
                rows, head, targets, workspace_bytes, want_direction=want_direction
            )
    return chunked_rest_sums(rows, head, targets, workspace_bytes, want_direction=want_direction)


def _head_gradients(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    backend: str,
    workspace_bytes: int,
    wanted: Wanted,
) -> HeadGradients:
    if rows.shape[0] == 0:
        tensors = (rows, head.weight, head.low_rank, head.bias)
        return HeadGradients(*(None if t is None else torch.zeros_like(t) for t in tensors))
    if backend == "triton":
        from .fused_head_gradients import triton_head_gradients

        with on_device(rows.device):
            return triton_head_gradients(
                rows, head, targets, rest_lse, scale, workspace_bytes, wanted
            )
    return chunked_head_gradients(rows, head, targets, rest_lse, scale, workspace_bytes, wanted)


def _logprobs_of_kept_rows(
    rows: Tensor,
    weight: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N], q [N], rest logsumexp [N], direction [N, D] or [0, D]."""
    head = Head(weight, low_rank, bias, HeadTransform(logit_scale, softcap))
    keep = kept_rows(targets, ignore_index)
    count = rows.shape[0]
    if keep is not None:
        rows, targets = rows[keep], targets[keep]
    sums = _rest_sums(rows, head, targets, backend, workspace_bytes, want_direction)
    against = sums.log_odds_against
    # threshold: past torch's default of 20 softplus would drop log1p(exp(-d)).
    logps = -F.softplus(against, threshold=60.0)
    direction = rows.new_empty(0, rows.shape[1])
    if want_direction and sums.direction is not None:
        direction = scattered(sums.direction, keep, count)
    return (
        scattered(logps, keep, count),
        scattered(torch.sigmoid(against), keep, count),
        scattered(sums.rest_lse, keep, count),
        direction,
    )


def _shapes_of_logprobs(
    rows: Tensor,
    weight: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_row = rows.new_empty(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    direction = rows.new_empty(rows.shape[0] if want_direction else 0, rows.shape[1])
    return per_row, torch.empty_like(per_row), torch.empty_like(per_row), direction


def _gradients_of_kept_rows(
    rows: Tensor,
    weight: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, weight, low_rank and bias; an empty tensor for each not wanted."""
    head = Head(weight, low_rank, bias, HeadTransform(logit_scale, softcap))
    keep = kept_rows(targets, ignore_index)
    count = rows.shape[0]
    if keep is not None:
        rows, targets, rest_lse, scale = rows[keep], targets[keep], rest_lse[keep], scale[keep]
    found = _head_gradients(
        rows, head, targets, rest_lse, scale, backend, workspace_bytes, Wanted(*wanted)
    )
    if found.rows is not None:
        found = found._replace(rows=scattered(found.rows, keep, count))
    return _of_wanted(found, wanted, rows)


def _of_wanted(
    gradients: Sequence[Tensor | None], wanted: list[bool], like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors: an empty one stands for a gradient nobody asked for."""
    rows, weight, low_rank, bias = (
        gradient if is_wanted and gradient is not None else like.new_empty(0)
        for gradient, is_wanted in zip(gradients, wanted, strict=True)
    )
    return rows, weight, low_rank, bias


def _shapes_of_gradients(
    rows: Tensor,
    weight: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Row by row, as the backends write it; the head's own gradients have the head's layout.
    like = [None if part is None else torch.empty_like(part) for part in (weight, low_rank, bias)]
    return _of_wanted([rows.new_empty(rows.shape), *like], wanted, rows)


_linear_logprobs = register_operator("linear_logprobs", _logprobs_of_kept_rows, _shapes_of_logprobs)
_linear_logprobs_gradients = register_operator(
    "linear_logprobs_gradients", _gradients_of_kept_rows, _shapes_of_gradients
)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        low_rank: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        settings: Settings,
        records_gradient: bool,
    ) -> Tensor:
        head_is_frozen = not any(ctx.needs_input_grad[1:4])
        want_direction = records_gradient and head_is_frozen and ctx.needs_input_grad[0]
        logps, miss, rest_lse, direction = _linear_logprobs(
            rows,
            weight,
            low_rank,
            bias,
            targets,
            *settings.transform,
            *settings[1:],
            want_direction,
        )
        if records_gradient:
            if head_is_frozen:
                ctx.save_for_backward(miss, direction)
            else:
                ctx.save_for_backward(miss, rest_lse, rows, weight, low_rank, bias, targets)
            ctx.head_is_frozen = head_is_frozen
            ctx.settings = settings
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if ctx.head_is_frozen:
            gradient = scaled_direction(grad_logps, *ctx.saved_tensors)
            return gradient, None, None, None, None, None, None
        miss, rest_lse, rows, weight, low_rank, bias, targets = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:4])
        # A caller's autocast around backward() would make these products bf16.
        with torch.autocast(rows.device.type, enabled=False):
            found = _linear_logprobs_gradients(
                rows,
                weight,
                low_rank,
                bias,
                targets,
                rest_lse,
                grad_logps * miss,
                *ctx.settings.transform,
                *ctx.settings[1:],
                wanted,
            )
        gradients = [
            gradient if is_wanted else None
            for gradient, is_wanted in zip(found, wanted, strict=True)
        ]
        return (*gradients, None, None, None)


def differentiable_logprobs(
    rows: Tensor,
    weight: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    settings: Settings,
) -> Tensor:
    """Log-probabilities [N] of rows [N, D]; see `fused_linear_logprobs`."""
    records_gradient = torch.is_grad_enabled()
    return _LinearLogProbs.apply(rows, weight, low_rank, bias, targets, settings, records_gradient)
