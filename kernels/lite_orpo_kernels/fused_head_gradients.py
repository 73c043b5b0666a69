"""Gradients of an LM head that trains, in Triton: its weight, its low-rank addition, its bias.

Full fine-tuning, tied embeddings, `modules_to_save` and a LoRA on the head come here. Logits are
made again, a chunk of the vocabulary a time, and leave the chip as the loss's gradient with
respect to them, in a workspace; plain products make the rest. Four GEMMs in all, three where the
weight itself is frozen.

Legend: M scored rows, V vocabulary, C columns of a chunk, D hidden size (with the rank of a
low-rank addition). Logits and logsumexps are in bits here, not nats.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_plan import round_up
from .fused_logprobs import (
    LN_2,
    Chunk,
    add_weighted_rows,
    aligned,
    chunk_of,
    logits_grid,
    logits_options,
)
from .head import Head, HeadGradients, Wanted
from .head_kernels import logits_tile, tile_of_program
from .launch_config import LaunchConfig, launch_config


@triton.jit(do_not_specialize=["rows", "columns", "first_column"])
def coefficients_kernel(
    # data
    hidden_ptr,  # [T, D]
    weight_ptr,  # [C, D]
    bias_ptr,  # [C]
    target_ptr,  # [T]
    lse_ptr,  # [T] bits
    scale_ptr,  # [T] fp32, incoming gradient times q times the logit scale
    coefficients_ptr,  # [T, C rounded up to blocks] out
    # sizes
    rows,
    columns,
    width,
    first_column,
    # strides
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_ct,
    # transform
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The loss's gradient with respect to a tile of head products, for a head that trains."""
    pid_t, pid_v = tile_of_program(rows, columns, BLOCK_T, BLOCK_V, GROUP)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    z, slope = logits_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        offs_t,
        offs_v,
        rows,
        columns,
        width,
        stride_ht,
        stride_hd,
        stride_wv,
        stride_wd,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
        EVEN_D,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        PRECISION,
        INTERPRETED,
    )
    mask_t = offs_t < rows
    local_target = tl.load(target_ptr + offs_t, mask=mask_t, other=-1) - first_column
    is_target = offs_v[None, :] == local_target[:, None]
    lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    # d logp / d z over q: 1 for the target, minus its share of the rest for any other.
    coefficients = tl.where(is_target, 1.0, -tl.exp2(z - lse[:, None]))
    if HAS_SOFTCAP:
        coefficients *= slope
    # In fp32, before any rounding: the gradient is as large as 1 / q where q is small.
    coefficients *= tl.load(scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    coefficients = tl.where((offs_v < columns)[None, :], coefficients, 0.0)
    out_ptrs = coefficients_ptr + offs_t.to(tl.int64)[:, None] * stride_ct + offs_v[None, :]
    tl.store(out_ptrs, coefficients.to(coefficients_ptr.dtype.element_ty), mask=mask_t[:, None])


def triton_head_gradients(
    rows: Tensor,
    head: Head,
    targets: Tensor,
    rest_lse: Tensor,
    scale: Tensor,
    workspace_bytes: int,
    wanted: Wanted,
) -> HeadGradients:
    """Gradients of a head that trains: logits are made again, a chunk of the vocabulary a time.

    `scale` [M] fp32 is the incoming gradient times q. All rows meet a chunk at once, so that a
    chunk's gradient is complete when the chunk is done and is written once: a chunk is at least a
    tile wide, so above some 100,000 rows the coefficients outgrow a workspace of 64 MiB.
    """
    config = launch_config(rows.device, rows.dtype, slim=True)
    joined = rows.shape[1]
    rows, head = aligned(rows, head)
    columns = _columns_for_gradients(rows, head, config, workspace_bytes)
    targets, scale = targets.contiguous(), (scale * head.transform.logit_scale).contiguous()
    lse = rest_lse / LN_2
    coefficients = rows.new_empty(rows.shape[0], columns)
    total = lse.new_empty(rows.shape) if wanted.rows else None
    weight = torch.empty_like(head.weight) if wanted.weight else None
    low_rank = (
        torch.empty_like(head.low_rank) if wanted.low_rank and head.low_rank is not None else None
    )
    bias = torch.empty_like(head.bias) if wanted.bias and head.bias is not None else None
    width = head.weight.shape[1]
    for start in range(0, head.vocabulary, columns):
        chunk = chunk_of(head, start, columns)
        own = slice(start, start + chunk.columns)
        _coefficients(rows, chunk, targets, head, config, lse, scale, coefficients)
        found = coefficients[:, : chunk.columns]
        if bias is not None:
            bias[own] = found.sum(dim=0, dtype=torch.float32).to(bias.dtype)
        if weight is not None:
            weight[own] = found.t() @ rows[:, :width]
        if low_rank is not None:
            low_rank[own] = found.t() @ rows[:, width:joined]
        if total is not None:
            add_weighted_rows(coefficients, chunk, total, config, None)
    return HeadGradients(
        None
        if total is None
        else total[:, :joined].to(rows.dtype, memory_format=torch.contiguous_format),
        weight,
        low_rank,
        bias,
    )


def _columns_for_gradients(
    rows: Tensor, head: Head, config: LaunchConfig, workspace_bytes: int
) -> int:
    size, tile = rows.element_size(), config.logits
    # The coefficients, and the chunk's gradient before it is where it belongs.
    per_column = size * (rows.shape[0] + head.width)
    per_column += 0 if head.low_rank is None else size * head.width
    columns = max(tile.block_v, workspace_bytes // per_column // tile.block_v * tile.block_v)
    parts = math.ceil(head.vocabulary / columns)
    return round_up(math.ceil(head.vocabulary / parts), tile.block_v)


def _coefficients(
    rows: Tensor,
    chunk: Chunk,
    targets: Tensor,
    head: Head,
    config: LaunchConfig,
    lse: Tensor,
    scale: Tensor,
    coefficients: Tensor,
) -> None:
    coefficients_kernel[logits_grid(rows.shape[0], chunk.columns, config)](
        rows,
        chunk.weight,
        rows if chunk.bias is None else chunk.bias,
        targets,
        lse,
        scale,
        coefficients,
        rows.shape[0],
        chunk.columns,
        rows.shape[1],
        chunk.start,
        *rows.stride(),
        *chunk.weight.stride(),
        coefficients.stride(0),
        **logits_options(rows, head, config),
    )
