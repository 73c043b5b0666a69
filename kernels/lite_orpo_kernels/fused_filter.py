"""The filtered form of the frozen head's gradient in Triton; see `gradient_filter.py`.

First one whole pass of sums, as without gradients: it gives every block's share of the rest's
probability before anything is multiplied out again. Then, chunk by chunk, only the kept tiles are
made again and multiplied with the head: 1 + 2 * kept share GEMMs instead of two.

Legend: R rows of a group, T tiles of rows, V vocabulary, K its blocks, D hidden size.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_plan import plan_chunks, round_up
from .fused_logprobs import (
    GROUP,
    LN_2,
    Chunk,
    Target,
    block_sums,
    chunk_of,
    fold_blocks,
    headroom_of,
    launch_options,
    write_direction,
)
from .head import Head, RestSums
from .head_kernels import tile_of_program, whole_bits
from .launch_config import LaunchConfig, launch_config


@triton.jit(do_not_specialize=["rows", "columns", "blocks", "first_block"])
def add_kept_rows_kernel(
    # data
    weights_ptr,  # [R, C rounded up to blocks], meaningless where a tile was left out
    weight_ptr,  # [C, D]
    total_ptr,  # [R, D] fp32, in and out
    block_lse_ptr,  # [blocks of C, R] bits
    lse_ptr,  # [R] bits, what total refers to
    kept_ptr,  # [T, K] int32: of each tile the kept blocks of the chunk first
    count_ptr,  # [T] int32, how many they are
    # sizes
    rows,
    columns,
    width,
    blocks,
    # strides
    stride_et,
    stride_wv,
    stride_wd,
    stride_ut,
    HEADROOM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Total += e @ W over the kept blocks of a chunk: `add_weighted_rows_kernel` with gaps."""
    pid_t, pid_d = tile_of_program(rows, width, BLOCK_T, BLOCK_D, GROUP)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    row = tl.minimum(offs_t, rows - 1).to(tl.int64)
    mask_d = offs_d < width
    mask = (offs_t < rows)[:, None] & mask_d[None, :]
    total_ptrs = total_ptr + row[:, None] * stride_ut + offs_d[None, :]
    weights_ptrs = weights_ptr + row[:, None] * stride_et + offs_c[None, :]
    weight_ptrs = weight_ptr + (
        offs_c.to(tl.int64)[:, None] * stride_wv + offs_d.to(tl.int64)[None, :] * stride_wd
    )
    reference = whole_bits(tl.load(lse_ptr + row)) - HEADROOM
    acc = tl.load(total_ptrs, mask=mask, other=0.0)
    kept = tl.load(count_ptr + pid_t)
    STEPS: tl.constexpr = BLOCK_V // BLOCK_C
    for step in range(0, kept * STEPS):
        block = tl.load(kept_ptr + pid_t * blocks + step // STEPS)
        first = block * BLOCK_V + (step % STEPS) * BLOCK_C
        e = tl.load(weights_ptrs + first)
        w = tl.load(
            weight_ptrs + first.to(tl.int64) * stride_wv,
            mask=(offs_c < columns - first)[:, None] & mask_d[None, :],
            other=0.0,
        )
        if INTERPRETED:
            e = e.to(tl.float32)
            w = w.to(tl.float32)
        lse = tl.load(block_lse_ptr + block.to(tl.int64) * rows + row)
        moved = tl.exp2(whole_bits(lse) - reference)
        e = e * tl.where(lse == float("-inf"), 0.0, moved).to(e.dtype)[:, None]
        acc = tl.dot(e, w, acc, input_precision=PRECISION)
    tl.store(total_ptrs, acc, mask=mask)


class FilteredSums(NamedTuple):
    """What `RestSums` has, and what was left out."""

    sums: RestSums
    error_bound: Tensor  # [M] relative to the direction's norm
    kept_share: Tensor  # []


class _Kept(NamedTuple):
    """Which blocks of a group are multiplied out, and what the others are replaced by."""

    is_kept: Tensor  # [T, K] bool
    total: Tensor  # [R, D] fp32: the left-out mass on the blocks' means, referring to lse
    error: Tensor  # [R] bound in units of the direction


def triton_filtered_sums(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    means: Tensor,
    radii: Tensor,
    min_block_mass: float,
    workspace_bytes: int,
) -> FilteredSums:
    """Sums and approximate direction of rows [M, D]; the head is frozen, without soft-cap.

    Beside the workspace this keeps ten bytes for each row and block of a group (logsumexp, mass,
    two masks).
    """
    config = launch_config(rows.device, rows.dtype)
    cut = plan_chunks(rows.shape[0], head, config, workspace_bytes, keeps_weights=True)
    target = Target.unmet(targets)
    lse = torch.empty_like(target.logit)
    # Rows by rows, whatever the layout of the hidden states.
    direction, error = rows.new_empty(rows.shape), torch.empty_like(lse)
    shares = []
    for start in range(0, rows.shape[0], cut.rows):
        group = slice(start, start + cut.rows)
        found = _filtered_group(
            rows[group],
            head,
            target.rows(group),
            cut.columns,
            config,
            (means, radii, min_block_mass),
            lse[group],
            direction[group],
        )
        error[group] = found.error
        shares.append(found.is_kept.float().mean() * rows[group].shape[0])
    size = direction.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    bound = error * abs(head.transform.logit_scale) / size
    sums = RestSums(lse * LN_2, (lse - target.logit) * LN_2, direction)
    return FilteredSums(sums, bound, torch.stack(shares).sum() / rows.shape[0])


def _filtered_group(
    rows: Tensor,
    head: Head,
    target: Target,
    columns: int,
    config: LaunchConfig,
    filter_of_head: tuple[Tensor, Tensor, float],
    lse: Tensor,
    direction: Tensor,
) -> _Kept:
    """Fill lse [R], the target's logit and direction [R, D] of one group of rows."""
    count, block = rows.shape[0], config.logits.block_v
    block_lse = lse.new_empty(triton.cdiv(head.vocabulary, block), count)
    whole = chunk_of(head, 0, head.vocabulary)
    block_sums(rows, whole, target, head, config, block_lse, None)
    fold_blocks(block_lse, torch.full_like(lse, -math.inf), lse)
    kept = _choose_blocks(block_lse, lse, config, headroom_of(rows), *filter_of_head)
    weights = rows.new_empty(count, round_up(min(columns, head.vocabulary), block))
    for start in range(0, head.vocabulary, columns):
        chunk = chunk_of(head, start, columns)
        own = slice(start // block, start // block + triton.cdiv(chunk.columns, block))
        is_kept = kept.is_kept[:, own].contiguous()
        block_sums(rows, chunk, target, head, config, block_lse[own], weights, is_kept)
        _add_kept_rows(weights, chunk, kept.total, config, block_lse[own], lse, is_kept)
    write_direction(kept.total, head, target, lse, direction)
    return kept


def _choose_blocks(
    block_lse: Tensor,
    lse: Tensor,
    config: LaunchConfig,
    headroom: float,
    means: Tensor,
    radii: Tensor,
    min_block_mass: float,
) -> _Kept:
    """A block is kept for a tile of rows if it holds more than the least mass for any of them."""
    blocks, count = block_lse.shape
    # Of the rest, not of all: a sure token's rest is what ORPO multiplies by 1 / (1 - p).
    known = torch.where(lse == -math.inf, torch.zeros_like(lse), lse)
    mass = torch.sub(block_lse, known).exp2_()
    tile = config.logits.block_t
    tiles = triton.cdiv(count, tile)
    # NaN is kept, and so seen.
    matters = ~(mass <= min_block_mass)
    padded = torch.nn.functional.pad(matters, (0, tiles * tile - count))
    is_kept = padded.view(blocks, tiles, tile).any(dim=2)
    mass.masked_fill_(is_kept.repeat_interleave(tile, dim=1)[:, :count], 0.0)
    total = (mass.to(means.dtype).t() @ means).float()
    # The second product refers to a whole number of bits; so must what it is added to.
    reference = torch.where(lse == -math.inf, torch.zeros_like(lse), lse.ceil()) - headroom
    total *= torch.exp2(known - reference).unsqueeze(1)
    return _Kept(is_kept.t().contiguous(), total, radii @ mass)


def _add_kept_rows(
    weights: Tensor,
    chunk: Chunk,
    total: Tensor,
    config: LaunchConfig,
    block_lse: Tensor,
    lse: Tensor,
    is_kept: Tensor,
) -> None:
    tile = config.rows
    tiles, blocks = is_kept.shape
    # The kept blocks of each tile first and in order; how many there are stays on the device.
    kept = is_kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    grid = tiles * triton.cdiv(total.shape[1], tile.block_d)
    add_kept_rows_kernel[(grid,)](
        weights,
        chunk.weight,
        total,
        block_lse,
        lse,
        kept,
        is_kept.sum(dim=1, dtype=torch.int32),
        total.shape[0],
        chunk.columns,
        total.shape[1],
        blocks,
        weights.stride(0),
        *chunk.weight.stride(),
        total.stride(0),
        HEADROOM=headroom_of(weights),
        BLOCK_T=config.logits.block_t,
        BLOCK_D=tile.block_d,
        BLOCK_C=tile.block_c,
        BLOCK_V=config.logits.block_v,
        GROUP=GROUP,
        **launch_options(weights, tile.warps, tile.stages),
    )
