"""The LM head's log-probabilities in Triton: how the kernels of `head_kernels.py` are launched.

Groups of rows meet chunks of the vocabulary. For each chunk one kernel makes tiles of logits on
the chip and lets only e and the tiles' logsumexps out, into a workspace; another multiplies e
with the chunk of the head and adds to the group's fp32 sum, in the same workspace. A frozen head
costs two GEMMs, a pass without gradients one (a head that trains: `fused_head_gradients.py`).
Nothing is added atomically: the same call gives the same bits.

Legend: M scored rows, R rows of a group, V vocabulary, C columns of a chunk, D hidden size (with
the rank of a low-rank addition). Logits and logsumexps are in bits here, not nats.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .chunk_plan import plan_chunks, round_up
from .head import Head, RestSums
from .head_kernels import (
    add_weighted_rows_kernel,
    block_sums_kernel,
    direction_kernel,
    fold_block_lse_kernel,
)
from .launch_config import LaunchConfig, launch_config

LN_2 = math.log(2.0)
IS_INTERPRETED = not isinstance(block_sums_kernel, triton.runtime.JITFunction)
FOLD_ROWS = 128
# A multiple of every BLOCK_D.
WIDTH_STEP = 64
DIRECTION_COLUMNS = 1024
# Neighbouring tiles of rows that share a tile of the head while it is in the cache.
GROUP = 8
# fp16 has no small numbers: the second product refers to 2**14 more, the largest that fits.
FP16_HEADROOM = 14.0


class Chunk(NamedTuple):
    """One chunk of the vocabulary of one head."""

    start: int
    columns: int
    weight: Tensor  # [C, D]
    bias: Tensor | None  # [C]


class Target(NamedTuple):
    """Each row's target and what is known of it once its column has been met, [M] or [R]."""

    token: Tensor  # int64
    logit: Tensor  # fp32 bits
    slope: Tensor  # fp32, the soft-cap's derivative

    @classmethod
    def unmet(cls, targets: Tensor) -> "Target":
        """Before any column: a target outside the vocabulary is met nowhere and stays NaN."""
        logit = torch.full(targets.shape, math.nan, dtype=torch.float32, device=targets.device)
        return cls(targets.contiguous(), logit, torch.ones_like(logit))

    def rows(self, group: slice) -> "Target":
        """Those of some rows; what is learnt of them is learnt of these."""
        return Target(self.token[group], self.logit[group], self.slope[group])


def chunk_of(head: Head, start: int, columns: int) -> Chunk:
    """Columns [start, start + columns) of the head, as far as there are any."""
    stop = min(start + columns, head.vocabulary)
    bias = head.bias_block(start, stop)
    bias = None if bias is None else bias.contiguous()
    return Chunk(start, stop - start, head.block(start, stop), bias)


def aligned(rows: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Fill up a head of two parts, which is copied anyway, to whole steps of the products.

    At a width like 4096 + 8 no load would be wide or asynchronous, and tiles would spill.
    """
    padding = 0 if head.low_rank is None else -head.width % WIDTH_STEP
    if padding == 0:
        return rows, head
    return F.pad(rows, (0, padding)), head._replace(padding=padding)


def triton_rest_sums(
    rows: Tensor, head: Head, targets: Tensor, workspace_bytes: int, *, want_direction: bool
) -> RestSums:
    """One pass over the vocabulary: the sums without the target and the gradient's direction.

    Args:
        rows: [M, D] bf16, fp16 or fp32, M > 0.
        head: in the dtype of rows.
        targets: [M] int64.
        workspace_bytes: bound on what is kept beside the results.
        want_direction: one more GEMM.

    Returns:
        fp32 [M] and, if wanted, the direction [M, D] in the dtype of rows. NaN where a target
        lies outside the vocabulary.
    """
    has_softcap = head.transform.softcap is not None
    config = launch_config(rows.device, rows.dtype, slim=has_softcap)
    count, width = rows.shape
    rows, head = aligned(rows, head)
    chunks = plan_chunks(count, head, config, workspace_bytes, keeps_weights=want_direction)
    target = Target.unmet(targets)
    lse = torch.empty_like(target.logit)
    direction = rows.new_empty(count, width) if want_direction else None
    for start in range(0, count, chunks.rows):
        group = slice(start, start + chunks.rows)
        _sum_group(
            rows[group],
            head,
            target.rows(group),
            chunks.columns,
            config,
            lse[group],
            None if direction is None else direction[group],
        )
    return RestSums(lse * LN_2, (lse - target.logit) * LN_2, direction)


def _sum_group(
    rows: Tensor,
    head: Head,
    target: Target,
    columns: int,
    config: LaunchConfig,
    lse: Tensor,
    direction: Tensor | None,
) -> None:
    """Fill lse [R], the target's logit and slope, and direction [R, D] of one group of rows."""
    count, tile = rows.shape[0], config.logits
    starts = range(0, head.vocabulary, columns)
    widest = round_up(min(columns, head.vocabulary), tile.block_v)
    block_lse = lse.new_empty(widest // tile.block_v, count)
    # What the sum refers to before and after each chunk.
    running = lse.new_empty(len(starts) + 1, round_up(count, FOLD_ROWS))
    running[0] = -math.inf
    weights = total = None
    if direction is not None:
        weights = rows.new_empty(count, widest)
        total = lse.new_empty(count, head.width)
    for number, start in enumerate(starts):
        chunk = chunk_of(head, start, columns)
        block_sums(rows, chunk, target, head, config, block_lse, weights)
        blocks = triton.cdiv(chunk.columns, tile.block_v)
        fold_blocks(block_lse[:blocks], running[number], running[number + 1])
        if weights is not None and total is not None:
            add_weighted_rows(
                weights, chunk, total, config, (block_lse, running[number], running[number + 1])
            )
    lse.copy_(running[-1, :count])
    if direction is not None and total is not None:
        write_direction(total, head, target, lse, direction)


def fold_blocks(block_lse: Tensor, before: Tensor, after: Tensor) -> None:
    """Fill after [R] with the logsumexp of before [R] and of block_lse [blocks, R], in bits."""
    blocks, rows = block_lse.shape
    fold_block_lse_kernel[(triton.cdiv(rows, FOLD_ROWS),)](
        block_lse, before, after, rows, blocks, BLOCK_T=FOLD_ROWS
    )


def block_sums(
    rows: Tensor,
    chunk: Chunk,
    target: Target,
    head: Head,
    config: LaunchConfig,
    block_lse: Tensor,
    weights: Tensor | None,
    is_kept: Tensor | None = None,
) -> None:
    """Fill block_lse [blocks, R], the target's logit and, if given, e [R, C] of one chunk."""
    out = rows if weights is None else weights
    block_sums_kernel[logits_grid(rows.shape[0], chunk.columns, config)](
        rows,
        chunk.weight,
        rows if chunk.bias is None else chunk.bias,
        *target,
        block_lse,
        out,
        block_lse if is_kept is None else is_kept.view(torch.uint8),
        rows.shape[0],
        chunk.columns,
        rows.shape[1],
        chunk.start,
        *rows.stride(),
        *chunk.weight.stride(),
        out.stride(0),
        WRITES_WEIGHTS=weights is not None,
        SKIPS_TILES=is_kept is not None,
        **logits_options(rows, head, config),
    )


def logits_grid(rows: int, columns: int, config: LaunchConfig) -> tuple[int]:
    """One program for each tile of logits."""
    tile = config.logits
    return (triton.cdiv(rows, tile.block_t) * triton.cdiv(columns, tile.block_v),)


def logits_options(rows: Tensor, head: Head, config: LaunchConfig) -> dict[str, Any]:
    """What every kernel that makes logits is told about the head and the launch."""
    tile, softcap = config.logits, head.transform.softcap
    return {
        "logit_scale": head.transform.logit_scale,
        "softcap": 1.0 if softcap is None else softcap,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "EVEN_D": rows.shape[1] % tile.block_d == 0,
        "BLOCK_T": tile.block_t,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP": GROUP,
        **launch_options(rows, tile.warps, tile.stages),
    }


def product_precision(dtype: torch.dtype, *, is_nvidia: bool) -> str:
    """How Triton is to multiply: it matters for fp32 only."""
    # One tf32 product would lose fp32's digits; three keep them, on the matrix units. AMD's
    # have fp32 products of their own, and know no tf32x3.
    return "tf32x3" if dtype == torch.float32 and is_nvidia else "ieee"


def launch_options(rows: Tensor, warps: int, stages: int) -> dict[str, Any]:
    """What every kernel with a matrix product is told."""
    return {
        "PRECISION": product_precision(rows.dtype, is_nvidia=torch.version.hip is None),
        "INTERPRETED": IS_INTERPRETED,
        "num_warps": warps,
        "num_stages": stages,
        # Triton's default is about to change, with a warning.
        "enable_fp_fusion": True,
    }


def headroom_of(weights: Tensor) -> float:
    """Bits that e is moved up by before the second product, where its dtype has few of them."""
    return FP16_HEADROOM if weights.dtype == torch.float16 else 0.0


def add_weighted_rows(
    weights: Tensor,
    chunk: Chunk,
    total: Tensor,
    config: LaunchConfig,
    relative_to: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Total [R, D] += weights [R, C] @ chunk [C, D]; see the kernel for what they refer to."""
    tile = config.rows
    block_lse, before, after = (total,) * 3 if relative_to is None else relative_to
    grid = triton.cdiv(total.shape[0], tile.block_t) * triton.cdiv(total.shape[1], tile.block_d)
    add_weighted_rows_kernel[(grid,)](
        weights,
        chunk.weight,
        total,
        block_lse,
        before,
        after,
        total.shape[0],
        chunk.columns,
        total.shape[1],
        weights.stride(0),
        *chunk.weight.stride(),
        total.stride(0),
        IS_FIRST=chunk.start == 0,
        IS_RELATIVE=relative_to is not None,
        HEADROOM=headroom_of(weights),
        BLOCK_T=tile.block_t,
        BLOCK_D=tile.block_d,
        BLOCK_C=tile.block_c,
        BLOCK_V=config.logits.block_v,
        GROUP=GROUP,
        **launch_options(weights, tile.warps, tile.stages),
    )


def write_direction(
    total: Tensor, head: Head, target: Target, lse: Tensor, direction: Tensor
) -> None:
    """Fill direction [R, D] from total [R, D], the sum of e * W that refers to lse [R]."""
    first = 0
    for part in (head.weight, head.low_rank):
        if part is None:
            continue
        width = part.shape[1]
        columns = slice(first, first + width)
        direction_kernel[(total.shape[0], triton.cdiv(width, DIRECTION_COLUMNS))](
            total[:, columns],
            part,
            target.token,
            target.slope,
            lse,
            direction[:, columns],
            head.vocabulary,
            width,
            total.stride(0),
            *part.stride(),
            direction.stride(0),
            head.transform.logit_scale,
            HAS_SOFTCAP=head.transform.softcap is not None,
            HEADROOM=headroom_of(direction),
            BLOCK_D=DIRECTION_COLUMNS,
        )
        first += width
