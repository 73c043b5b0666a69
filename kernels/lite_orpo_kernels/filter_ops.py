"""The filtered log-probabilities as an operator and as one autograd Function.

Exact log-probabilities, an approximate direction of the gradient: see `gradient_filter.py`. Kept
apart from `head_ops.py`, whose gradients are exact.

Legend: N rows as given, D hidden size, V vocabulary, K blocks of the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradient_filter import GradientFilter
from .head import Head, HeadTransform
from .head_ops import Settings, kept_rows, refuse_second_derivatives, scaled_direction, scattered
from .launch_config import launch_config, on_device
from .operators import register_operator


def _filtered_logprobs_of_kept_rows(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    means: Tensor,
    radii: Tensor,
    logit_scale: float,
    ignore_index: int | None,
    workspace_bytes: int,
    min_block_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N], q [N], direction [N, D], error bound [N], kept share []."""
    from .fused_filter import triton_filtered_sums

    head = Head(weight, None, bias, HeadTransform(logit_scale, None))
    keep = kept_rows(targets, ignore_index)
    count = rows.shape[0]
    if count == 0 or (keep is not None and keep.numel() == 0):
        nothing = [rows.new_zeros(count, dtype=torch.float32) for _ in range(3)]
        return nothing[0], nothing[1], rows.new_zeros(rows.shape), nothing[2], radii.new_ones(())
    if keep is not None:
        rows, targets = rows[keep], targets[keep]
    with on_device(rows.device):
        found = triton_filtered_sums(
            rows, head, targets, means, radii, min_block_mass, workspace_bytes
        )
    against, direction = found.sums.log_odds_against, found.sums.direction
    assert direction is not None
    logps = -F.softplus(against, threshold=60.0)
    return (
        scattered(logps, keep, count),
        scattered(torch.sigmoid(against), keep, count),
        scattered(direction, keep, count),
        scattered(found.error_bound, keep, count),
        found.kept_share,
    )


def _shapes_of_filtered_logprobs(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    means: Tensor,
    radii: Tensor,
    logit_scale: float,
    ignore_index: int | None,
    workspace_bytes: int,
    min_block_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_row = radii.new_empty(rows.shape[0])
    others = torch.empty_like(per_row), rows.new_empty(rows.shape), torch.empty_like(per_row)
    return per_row, *others, radii.new_empty(())


_filtered_logprobs = register_operator(
    "filtered_logprobs", _filtered_logprobs_of_kept_rows, _shapes_of_filtered_logprobs
)


class _FilteredLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gradient_filter: GradientFilter,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps, miss, direction, bound, share = _filtered_logprobs(
            rows,
            weight,
            bias,
            targets,
            gradient_filter.means,
            gradient_filter.radii,
            settings.transform.logit_scale,
            settings.ignore_index,
            settings.workspace_bytes,
            gradient_filter.min_block_mass,
        )
        ctx.save_for_backward(miss, direction)
        ctx.mark_non_differentiable(bound, share)
        return logps, bound, share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return scaled_direction(gradients[0], *ctx.saved_tensors), None, None, None, None, None


def filtered_logprobs(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    gradient_filter: GradientFilter,
    settings: Settings,
) -> Tensor:
    """Log-probabilities [N] of rows [N, D]; says in the filter what was left out.

    Raises:
        ValueError: the filter is not this head's, or does not fit what is asked for.
    """
    _check(weight, bias, gradient_filter, settings)
    logps, bound, share = _FilteredLogProbs.apply(
        rows, weight, bias, targets, gradient_filter, settings
    )
    gradient_filter.error_bound, gradient_filter.kept_share = bound, share
    return logps


def _check(
    weight: Tensor, bias: Tensor | None, gradient_filter: GradientFilter, settings: Settings
) -> None:
    if settings.backend != "triton":
        raise ValueError(
            f"gradient_filter needs the Triton kernels, but backend {settings.backend!r} would "
            "run here; leave it out"
        )
    if settings.transform.softcap is not None:
        raise ValueError("gradient_filter does not go with a soft-cap; leave it out")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("gradient_filter needs a frozen head; leave it out")
    own = gradient_filter.weight
    if own.dtype != weight.dtype:
        raise ValueError(
            f"gradient_filter is for {own.dtype}, but the head is {weight.dtype} here (autocast "
            "casts it); make the filter for a weight in that dtype and pass that"
        )
    is_same = own.data_ptr() == weight.data_ptr() and own.stride() == weight.stride()
    if not is_same or own.shape != weight.shape:
        raise ValueError("gradient_filter was made for another head; make one for this weight")
    if own._version != gradient_filter.version:
        raise ValueError("the head has changed since gradient_filter was made; make it again")
    if gradient_filter.block_columns != launch_config(weight.device, weight.dtype).logits.block_v:
        raise ValueError("the launch configuration has changed; make gradient_filter again")
