"""The LM head's log-probabilities in pure PyTorch and bounded memory.

What laptops run: CPU, Apple MPS, and every GPU without a Triton kernel. All rows meet one block
of the vocabulary at a time, so the head is read once per pass and a [rows, V] logits tensor
never exists. With a frozen head the gradient's direction is made in the forward pass, beside
the sums, and only scaled in the backward: two GEMMs in all. A trainable head costs four.

Legend: M scored rows (none ignored), D hidden size (with the rank of a low-rank addition), V
vocabulary, B columns of one block. z = transformed logits, r = logsumexp of z without the target,
d = r - z_target, nll = softplus(d), q = sigmoid(d) = 1 - p(target), s = softmax of z without the
target.

Numerics: sums are fp32 (fp64 for fp64 inputs) and refer to a running maximum. The direction is
stored divided by q, as c_y W[y] - sum_v s_v c_v W[v] (c is the soft-cap's derivative): it does
not underflow in half precision where the token is memorised and q ~ 1e-8; q stays fp32 and is
multiplied with the incoming gradient, which is as large as 1/q there, before any rounding.
"""

import functools
import math

import torch
from torch import Tensor

from .head import Head, HeadGradients, HeadTransform, RestSums, Wanted, accumulation_dtype

MIN_BLOCK_COLUMNS = 64
# On a CPU larger blocks only leave its caches: 32 MiB took 0.8 of the time of 64 MiB.
MOST_BYTES_ON_CPU = 32 * 2**20
# exp is slow on CPUs where it underflows (wide logits have most of their mass there); exp2 is not.
LOG2_E = math.log2(math.e)


def block_columns(
    rows: Tensor, head: Head, workspace_bytes: int, *, head_trains: bool = False
) -> int:
    """Columns of the vocabulary per block, so that a block's temporaries fit the workspace."""
    count, width = rows.shape
    size = torch.empty((), dtype=accumulation_dtype(rows.dtype)).element_size()
    per_column = size * count * (1 if head.transform.softcap is None else 2)
    if _second_product_is_half(rows):
        per_column += rows.element_size() * count
    if _computes_in_full_precision(rows):
        workspace_bytes = min(workspace_bytes, MOST_BYTES_ON_CPU)
        if rows.element_size() < size or head.low_rank is not None:
            # The block of the head, cast or put together; and that of its gradient, before it is.
            per_column += size * width * (2 if head_trains else 1)
    else:
        per_column += 2 * rows.element_size() * count
        per_column += 0 if head.low_rank is None else rows.element_size() * width
    columns = max(MIN_BLOCK_COLUMNS, workspace_bytes // max(per_column, 1))
    # Equal blocks: a narrow last one would waste a pass over the rows.
    return math.ceil(head.vocabulary / math.ceil(head.vocabulary / columns))


def _computes_in_full_precision(rows: Tensor) -> bool:
    # Most CPUs have no half-precision GEMM: torch falls to a loop that is 100 times slower.
    # A block of the head is cast once and serves all rows, and the logits are better for it.
    return rows.device.type == "cpu"


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (Zen 4, Sapphire Rapids and newer)."""
    look = getattr(torch.cpu, "get_capabilities", None)  # not in every PyTorch from 2.11 on
    found = look() if look is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _second_product_is_half(rows: Tensor) -> bool:
    """Whether e @ W is done in the dtype of the head, as it is on a GPU: 0.7 of the time."""
    # The first product stays fp32 on every CPU: logits rounded to bf16 would cost the
    # log-probabilities' digits.
    on_cpu = _computes_in_full_precision(rows)
    return on_cpu and rows.dtype == torch.bfloat16 and _cpu_multiplies_bf16()


def _rows_for_gemm(rows: Tensor) -> Tensor:
    if _computes_in_full_precision(rows):
        return rows.to(accumulation_dtype(rows.dtype))
    return rows


class _Workspace:
    """Room for a block of logits and of the head, used again: fresh pages cost more than exp."""

    def __init__(self, rows: Tensor, head: Head, columns: int) -> None:
        self.dtype = accumulation_dtype(rows.dtype)
        self._logits = rows.new_empty(rows.shape[0] * columns, dtype=self.dtype)
        self._cast = None
        if head.weight.dtype != rows.dtype or head.low_rank is not None:
            self._cast = rows.new_empty(columns, head.width)

    def product(self, rows: Tensor, block: Tensor) -> Tensor:
        """Return rows [M, D] times block [B, D] transposed, in the accumulation dtype."""
        shape = (rows.shape[0], block.shape[0])
        out = self._logits[: shape[0] * shape[1]].view(shape)
        if rows.dtype == self.dtype:
            return torch.mm(rows, block.t(), out=out)
        return out.copy_(rows @ block.t())

    def head_block(self, head: Head, start: int, stop: int) -> Tensor:
        """Columns of the head [B, D] in the dtype of the products."""
        if self._cast is None:
            return head.block(start, stop)
        block = self._cast[: min(stop, head.vocabulary) - start]
        split = head.weight.shape[1]
        block[:, :split].copy_(head.weight[start:stop])
        if head.low_rank is not None:
            block[:, split:].copy_(head.low_rank[start:stop])
        return block


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the total, with the product in the dtype of `right`."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


def _transformed(
    logits: Tensor, bias_block: Tensor | None, transform: HeadTransform
) -> tuple[Tensor, Tensor | None]:
    """One block of logits [M, B], in place, and the soft-cap's derivative (None without one)."""
    if bias_block is not None:
        logits += bias_block
    if transform.logit_scale != 1.0:
        logits *= transform.logit_scale
    if transform.softcap is None:
        return logits, None
    logits.div_(transform.softcap).tanh_()
    slope = logits.square().neg_().add_(1.0)
    return logits.mul_(transform.softcap), slope


def _exp_(logits: Tensor) -> Tensor:
    return logits.mul_(LOG2_E).exp2_()


def _target_columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in the block (clamped into it) and whether it truly lies there."""
    local = targets - start
    inside = (local >= 0) & (local < width)
    return local.clamp(0, width - 1).unsqueeze(1), inside.unsqueeze(1)


def chunked_rest_sums(
    hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int, *, want_direction: bool
) -> RestSums:
    """One pass over the vocabulary: the sums without the target and the gradient's direction.

    Args:
        hidden: [M, D].
        head: in the dtype of hidden.
        targets: [M] int64 in [0, V).
        workspace_bytes: bound on a block's temporaries.
        want_direction: one more GEMM.

    Returns:
        [M] in the accumulation dtype and, if wanted, the direction in the dtype of hidden.
    """
    rows = _rows_for_gemm(hidden)
    dtype = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]
    second_is_half = _second_product_is_half(hidden)
    running_max = torch.full((count, 1), float("-inf"), dtype=dtype, device=hidden.device)
    running_sum = torch.zeros((count, 1), dtype=dtype, device=hidden.device)
    target_logit = torch.zeros((count, 1), dtype=dtype, device=hidden.device)
    target_slope = torch.ones((count, 1), dtype=dtype, device=hidden.device)
    mean_row = (
        torch.zeros((count, head.width), dtype=dtype, device=hidden.device)
        if want_direction
        else None
    )
    columns = block_columns(hidden, head, workspace_bytes)
    workspace = _Workspace(rows, head, columns)
    for start in range(0, head.vocabulary, columns):
        block = workspace.head_block(head, start, start + columns)
        logits, slope = _transformed(
            workspace.product(rows, block), head.bias_block(start, start + columns), head.transform
        )
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
        weights = _exp_(logits.sub_(reference))
        running_sum.mul_(rescale).add_(weights.sum(dim=1, keepdim=True))
        running_max = new_max
        if mean_row is not None:
            if slope is not None:
                weights.mul_(slope)
            if second_is_half:
                block = head.block(start, start + columns)
            _accumulate(mean_row.mul_(rescale), weights, block)
        # Or the next block is made while this one is alive: twice the workspace.
        del block, slope
    rest_lse = running_max + running_sum.log()
    direction = None
    if mean_row is not None:
        mean_row.div_(running_sum.clamp_min(torch.finfo(dtype).tiny))
        mean_row.neg_().add_(head.target_rows(targets).to(dtype).mul_(target_slope))
        direction = mean_row.mul_(head.transform.logit_scale).to(hidden.dtype)
    return RestSums(rest_lse.squeeze(1), (rest_lse - target_logit).squeeze(1), direction)


def chunked_head_gradients(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    workspace_bytes: int,
    wanted: Wanted,
) -> HeadGradients:
    """Gradients of a head that trains: logits are made again, block by block.

    `scale` [M] is the incoming gradient times q. A block of the head's gradient is complete when
    its block is done, so nothing is accumulated in the weights' own (maybe half) precision.
    """
    rows = _rows_for_gemm(hidden)
    total = torch.zeros_like(rows, dtype=accumulation_dtype(hidden.dtype)) if wanted.rows else None
    found = HeadGradients(
        None,
        torch.empty_like(head.weight) if wanted.weight else None,
        torch.empty_like(head.low_rank) if wanted.low_rank and head.low_rank is not None else None,
        torch.empty_like(head.bias) if wanted.bias and head.bias is not None else None,
    )
    scale = (scale * head.transform.logit_scale).unsqueeze(1)
    # With V = 1 the rest is empty and there is nothing to refer to.
    reference = rest_lse.masked_fill(rest_lse == float("-inf"), 0.0).unsqueeze(1)
    head_trains = wanted.weight or wanted.low_rank
    columns = block_columns(hidden, head, workspace_bytes, head_trains=head_trains)
    workspace = _Workspace(rows, head, columns)
    split = head.weight.shape[1]
    for start in range(0, head.vocabulary, columns):
        own = slice(start, start + columns)
        block = workspace.head_block(head, start, start + columns)
        logits, slope = _transformed(
            workspace.product(rows, block), head.bias_block(start, start + columns), head.transform
        )
        column, inside = _target_columns(targets, start, logits.shape[1])
        # d logp / d z, divided by q: 1 for the target, -s for the rest.
        coefficients = _exp_(logits.sub_(reference)).neg_()
        here = coefficients.gather(1, column)
        coefficients.scatter_(1, column, torch.where(inside, torch.ones_like(here), here))
        if slope is not None:
            coefficients.mul_(slope)
        coefficients.mul_(scale)
        if found.bias is not None:
            found.bias[own] = coefficients.sum(dim=0).to(found.bias.dtype)
        coefficients = coefficients.to(rows.dtype)
        if found.weight is not None:
            _product_into(found.weight[own], coefficients, rows[:, :split])
        if found.low_rank is not None:
            _product_into(found.low_rank[own], coefficients, rows[:, split:])
        if total is not None:
            _accumulate(total, coefficients, block)
        # Or the next block is made while this one is alive: twice the workspace.
        del block, slope, coefficients
    return found._replace(rows=None if total is None else total.to(hidden.dtype))


def _product_into(out: Tensor, coefficients: Tensor, rows: Tensor) -> None:
    if out.dtype == rows.dtype:
        torch.mm(coefficients.t(), rows, out=out)
    else:
        out.copy_(coefficients.t() @ rows)
