"""The LM head's log-probabilities in pure PyTorch and bounded memory.

What laptops run: CPU, Apple MPS, and every GPU without a Triton kernel. All rows meet one block
of the vocabulary at a time, so the head is read once per pass and a [rows, V] logits tensor
never exists. With a frozen head the gradient's direction is made in the forward pass, beside
the sums, and only scaled in the backward: two GEMMs in all. A trainable head costs four.

Legend: M scored rows (none ignored), D hidden size, V vocabulary, B columns of one block.
z = transformed logits, r = logsumexp of z without the target, d = r - z_target,
nll = softplus(d), q = sigmoid(d) = 1 - p(target), s = softmax of z without the target.

Numerics: sums are fp32 (fp64 for fp64 inputs) and refer to a running maximum. The direction is
stored divided by q, as c_y W[y] - sum_v s_v c_v W[v] (c is the soft-cap's derivative): it does
not underflow in half precision where the token is memorised and q ~ 1e-8; q stays fp32 and is
multiplied with the incoming gradient, which is as large as 1/q there, before any rounding.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BLOCK_COLUMNS = 64


class HeadTransform(NamedTuple):
    """What stands between the head's matrix product and the softmax."""

    logit_scale: float
    softcap: float | None


class _RestSums(NamedTuple):
    """One pass over the vocabulary: per row, what the loss and its gradient need."""

    rest_lse: Tensor  # [M] r
    target_logit: Tensor  # [M] z_target
    direction: Tensor | None  # [M, D] d logp / d hidden, divided by q


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_columns(
    hidden: Tensor,
    vocabulary: int,
    transform: HeadTransform,
    workspace_bytes: int,
    *,
    head_trains: bool = False,
) -> int:
    """Columns of the vocabulary per block, so that a block's temporaries fit the workspace."""
    rows, width = hidden.shape
    size = torch.empty((), dtype=accumulation_dtype(hidden.dtype)).element_size()
    per_column = size * rows * (1 if transform.softcap is None else 2)
    if _computes_in_full_precision(hidden):
        if hidden.element_size() < size:
            # The block of the head, cast; and that of its gradient, before it is.
            per_column += size * width * (2 if head_trains else 1)
    else:
        per_column += 2 * hidden.element_size() * rows
    columns = max(MIN_BLOCK_COLUMNS, workspace_bytes // max(per_column, 1))
    # Equal blocks: a narrow last one would waste a pass over the rows.
    return math.ceil(vocabulary / math.ceil(vocabulary / columns))


def _computes_in_full_precision(hidden: Tensor) -> bool:
    # Most CPUs have no half-precision GEMM: torch falls to a loop that is 100 times slower.
    # A block of the head is cast once and serves all rows, and the logits are better for it.
    return hidden.device.type == "cpu"


def _rows_for_gemm(hidden: Tensor) -> Tensor:
    if _computes_in_full_precision(hidden):
        return hidden.to(accumulation_dtype(hidden.dtype))
    return hidden


class _Workspace:
    """Room for one block of logits, used again for every block: fresh pages cost more than exp."""

    def __init__(self, rows: Tensor, columns: int) -> None:
        self.dtype = accumulation_dtype(rows.dtype)
        self._buffer = rows.new_empty(rows.shape[0] * columns, dtype=self.dtype)

    def product(self, rows: Tensor, weight_block: Tensor) -> Tensor:
        """Return rows [M, D] times weight_block [B, D] transposed, in the accumulation dtype."""
        shape = (rows.shape[0], weight_block.shape[0])
        out = self._buffer[: shape[0] * shape[1]].view(shape)
        if rows.dtype == self.dtype:
            return torch.mm(rows, weight_block.t(), out=out)
        return out.copy_(rows @ weight_block.t())


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the total, with the product in the dtype of `right`."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


def _transformed_logits(
    workspace: _Workspace,
    rows: Tensor,
    weight_block: Tensor,
    bias_block: Tensor | None,
    transform: HeadTransform,
) -> tuple[Tensor, Tensor | None]:
    """One block of logits [M, B] and the soft-cap's derivative there (None without a cap)."""
    logits = workspace.product(rows, weight_block)
    if bias_block is not None:
        logits += bias_block
    if transform.logit_scale != 1.0:
        logits *= transform.logit_scale
    if transform.softcap is None:
        return logits, None
    logits.div_(transform.softcap).tanh_()
    slope = logits.square().neg_().add_(1.0)
    return logits.mul_(transform.softcap), slope


def _target_columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in the block (clamped into it) and whether it truly lies there."""
    local = targets - start
    inside = (local >= 0) & (local < width)
    return local.clamp(0, width - 1).unsqueeze(1), inside.unsqueeze(1)


def _sum_over_the_rest(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: HeadTransform,
    workspace_bytes: int,
    *,
    want_direction: bool,
) -> _RestSums:
    vocabulary, width = weight.shape
    rows = _rows_for_gemm(hidden)
    dtype = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]
    running_max = torch.full((count, 1), float("-inf"), dtype=dtype, device=hidden.device)
    running_sum = torch.zeros((count, 1), dtype=dtype, device=hidden.device)
    target_logit = torch.zeros((count, 1), dtype=dtype, device=hidden.device)
    target_slope = torch.ones((count, 1), dtype=dtype, device=hidden.device)
    mean_row = (
        torch.zeros((count, width), dtype=dtype, device=hidden.device) if want_direction else None
    )
    columns = block_columns(hidden, vocabulary, transform, workspace_bytes)
    workspace = _Workspace(rows, columns)
    for start in range(0, vocabulary, columns):
        block = weight[start : start + columns].to(rows.dtype)
        bias_block = None if bias is None else bias[start : start + columns]
        logits, slope = _transformed_logits(workspace, rows, block, bias_block, transform)
        column, inside = _target_columns(targets, start, logits.shape[1])
        here = logits.gather(1, column)
        target_logit = torch.where(inside, here, target_logit)
        if slope is not None:
            target_slope = torch.where(inside, slope.gather(1, column), target_slope)
        # The target leaves the sum here, for good: that is what keeps nll exact at p -> 1.
        logits.scatter_(1, column, here.masked_fill(inside, float("-inf")))
        new_max = torch.maximum(running_max, logits.amax(dim=1, keepdim=True))
        # A row that has seen nothing but its own target (V = 1) has no maximum to refer to.
        reference = new_max.masked_fill(new_max == float("-inf"), 0.0)
        rescale = torch.exp(running_max - reference)
        weights = logits.sub_(reference).exp_()
        running_sum.mul_(rescale).add_(weights.sum(dim=1, keepdim=True))
        running_max = new_max
        if mean_row is not None:
            if slope is not None:
                weights.mul_(slope)
            _accumulate(mean_row.mul_(rescale), weights, block)
        # Or the next block is made while this one is alive: twice the workspace.
        del block, slope
    rest_lse = running_max + running_sum.log()
    direction = None
    if mean_row is not None:
        mean_row.div_(running_sum.clamp_min(torch.finfo(dtype).tiny))
        mean_row.neg_().add_(weight[targets].to(dtype).mul_(target_slope))
        direction = mean_row.mul_(transform.logit_scale).to(hidden.dtype)
    return _RestSums(rest_lse.squeeze(1), target_logit.squeeze(1), direction)


class _HeadGradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _recomputed_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    transform: HeadTransform,
    workspace_bytes: int,
    wanted: tuple[bool, bool, bool],
) -> _HeadGradients:
    """Gradients of a head that trains: logits are made again, block by block.

    `scale` [M] is the incoming gradient times q. A block of the head's gradient is complete when
    its block is done, so nothing is accumulated in the weights' own (maybe half) precision.
    """
    want_hidden, want_weight, want_bias = wanted
    vocabulary, width = weight.shape
    rows = _rows_for_gemm(hidden)
    dtype = accumulation_dtype(hidden.dtype)
    hidden_grad = torch.zeros_like(hidden, dtype=dtype) if want_hidden else None
    weight_grad = torch.empty_like(weight) if want_weight else None
    bias_grad = torch.empty_like(bias) if want_bias and bias is not None else None
    scale = (scale * transform.logit_scale).unsqueeze(1)
    # With V = 1 the rest is empty and there is nothing to refer to.
    reference = rest_lse.masked_fill(rest_lse == float("-inf"), 0.0).unsqueeze(1)
    columns = block_columns(hidden, vocabulary, transform, workspace_bytes, head_trains=want_weight)
    workspace = _Workspace(rows, columns)
    for start in range(0, vocabulary, columns):
        block = weight[start : start + columns].to(rows.dtype)
        bias_block = None if bias is None else bias[start : start + columns]
        logits, slope = _transformed_logits(workspace, rows, block, bias_block, transform)
        column, inside = _target_columns(targets, start, logits.shape[1])
        # d logp / d z, divided by q: 1 for the target, -s for the rest.
        coefficients = logits.sub_(reference).exp_().neg_()
        here = coefficients.gather(1, column)
        coefficients.scatter_(1, column, torch.where(inside, torch.ones_like(here), here))
        if slope is not None:
            coefficients.mul_(slope)
        coefficients.mul_(scale)
        if bias_grad is not None:
            bias_grad[start : start + columns] = coefficients.sum(dim=0).to(bias_grad.dtype)
        coefficients = coefficients.to(rows.dtype)
        if weight_grad is not None:
            into = weight_grad[start : start + columns]
            if into.dtype == rows.dtype:
                torch.mm(coefficients.t(), rows, out=into)
            else:
                into.copy_(coefficients.t() @ rows)
        if hidden_grad is not None:
            _accumulate(hidden_grad, coefficients, block)
        # Or the next block is made while this one is alive: twice the workspace.
        del block, slope, coefficients
    return _HeadGradients(
        None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad
    )


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: HeadTransform,
        workspace_bytes: int,
        records_gradient: bool,
    ) -> Tensor:
        head_is_frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        want_direction = records_gradient and head_is_frozen and ctx.needs_input_grad[0]
        sums = _sum_over_the_rest(
            hidden, weight, bias, targets, transform, workspace_bytes, want_direction=want_direction
        )
        log_odds_against = sums.rest_lse - sums.target_logit
        if records_gradient:
            miss = torch.sigmoid(log_odds_against)
            if head_is_frozen:
                ctx.save_for_backward(miss, sums.direction)
            else:
                ctx.save_for_backward(miss, sums.rest_lse, hidden, weight, bias, targets)
            ctx.head_is_frozen = head_is_frozen
            ctx.transform = transform
            ctx.workspace_bytes = workspace_bytes
        # threshold: past torch's default of 20 softplus would drop log1p(exp(-d)).
        return -F.softplus(log_odds_against, threshold=60.0)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here only under create_graph=True. torch's once_differentiable would
        # let that pass, and drop this function's part of the second derivative silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused log-probabilities are differentiable once; for second derivatives use "
                'backend="reference"'
            )
        if ctx.head_is_frozen:
            miss, direction = ctx.saved_tensors
            scale = (grad_logps * miss).unsqueeze(1)
            return (scale * direction).to(direction.dtype), None, None, None, None, None, None
        miss, rest_lse, hidden, weight, bias, targets = ctx.saved_tensors
        # A caller's autocast around backward() would make these products bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _recomputed_gradients(
                hidden,
                weight,
                bias,
                targets,
                rest_lse,
                grad_logps * miss,
                ctx.transform,
                ctx.workspace_bytes,
                ctx.needs_input_grad[:3],
            )
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: HeadTransform,
    workspace_bytes: int,
) -> Tensor:
    """Log-probabilities [M] of rows that all carry a target; see `fused_linear_logprobs`."""
    records_gradient = torch.is_grad_enabled()
    return _ChunkedLogProbs.apply(
        hidden, weight, bias, targets, transform, workspace_bytes, records_gradient
    )
