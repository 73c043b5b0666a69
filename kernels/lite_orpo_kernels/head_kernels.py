"""The Triton kernels of the LM head. How they are launched is in `fused_logprobs.py`.

Legend: T scored rows (one block: t), V vocabulary (v), D hidden size (d), R rows of one group,
C columns of one chunk of the vocabulary, y a row's target.

Numerics: logits are kept in bits (multiplied by log2 e), so that every exponential is exp2. The
target's column is masked out of all sums; a logit tile leaves the chip only as

    e = 2 ** (z - ceil(block_lse))        in the dtype of the head, between 0 and 1,

relative to the logsumexp of its own row in its own block. There is no running maximum to wait
for and no input that overflows; and because that reference is a whole number of bits, the second
product moves e to a common reference exactly, by changing its exponent. An empty sum (V = 1, or
a block that holds only the target) is -inf and is guarded wherever it is used as a reference.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """Tanh and its derivative in fp32, both with their digits near 0 and where tanh saturates.

    1 - tanh**2 would have lost them there; libdevice's tanh is not on every target.
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0))))
    value = tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0.0, -far, far))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def whole_bits(lse):
    """Round a logsumexp up to a whole number of bits; 0 for an empty one."""
    return tl.where(lse == float("-inf"), 0.0, tl.ceil(lse))


@triton.jit
def tile_of_program(
    rows, columns, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr
):
    """Neighbouring programs share columns of the head (then rows), so that L2 holds them."""
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(rows, BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    per_group = GROUP * tiles_v
    first_t = (pid // per_group) * GROUP
    group = tl.minimum(tiles_t - first_t, GROUP)
    pid_t = first_t + (pid % per_group) % group
    pid_v = (pid % per_group) // group
    return pid_t, pid_v


@triton.jit
def logits_tile(
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
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Transformed logits [BLOCK_T, BLOCK_V] in bits, and the soft-cap's derivative there."""
    # Clamped, not masked: what lies beyond the end is computed from the last row and not used.
    row = tl.minimum(offs_t, rows - 1).to(tl.int64)
    column = tl.minimum(offs_v, columns - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    wide_d = offs_d.to(tl.int64)
    hidden_ptrs = hidden_ptr + row[:, None] * stride_ht + wide_d[None, :] * stride_hd
    weight_ptrs = weight_ptr + column[None, :] * stride_wv + wide_d[:, None] * stride_wd
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for d in range(0, width, BLOCK_D):
        if EVEN_D:
            h = tl.load(hidden_ptrs)
            w = tl.load(weight_ptrs)
        else:
            inside = offs_d < width - d
            h = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # its dot would multiply the bits of bf16 as integers
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
        hidden_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_hd
        weight_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_wd
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        bent, slope = _tanh(acc * (logit_scale / softcap))
        return bent * (softcap * LOG2_E), slope
    return acc * (logit_scale * LOG2_E), acc


@triton.jit(do_not_specialize=["rows", "columns", "first_column"])
def block_sums_kernel(
    # data
    hidden_ptr,  # [R, D]
    weight_ptr,  # [C, D]
    bias_ptr,  # [C]
    target_ptr,  # [R] int64, in the whole vocabulary
    target_logit_ptr,  # [R] out, bits; by whichever program holds the target
    target_slope_ptr,  # [R] out, the soft-cap's derivative there
    block_lse_ptr,  # [blocks of C, R] out, bits
    weights_ptr,  # [R, C rounded up to blocks] out
    kept_ptr,  # [tiles of R, blocks of C] whether the tile is wanted at all
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
    stride_et,
    # transform
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WRITES_WEIGHTS: tl.constexpr,
    SKIPS_TILES: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of logits: its rows' logsumexp without the target, and e for the second product."""
    pid_t, pid_v = tile_of_program(rows, columns, BLOCK_T, BLOCK_V, GROUP)
    if SKIPS_TILES:
        if tl.load(kept_ptr + pid_t * tl.cdiv(columns, BLOCK_V) + pid_v) == 0:
            return
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
    # Exactly one program holds a row's target: nothing is added up across programs.
    holds_target = (local_target >= pid_v * BLOCK_V) & (
        local_target < tl.minimum((pid_v + 1) * BLOCK_V, columns)
    )
    target_logit = tl.sum(tl.where(is_target, z, 0.0), axis=1)
    tl.store(target_logit_ptr + offs_t, target_logit, mask=mask_t & holds_target)
    if HAS_SOFTCAP:
        target_slope = tl.sum(tl.where(is_target, slope, 0.0), axis=1)
        tl.store(target_slope_ptr + offs_t, target_slope, mask=mask_t & holds_target)
    z = tl.where(is_target | (offs_v >= columns)[None, :], float("-inf"), z)
    reference = whole_bits(tl.max(z, axis=1))
    e = tl.exp2(z - reference[:, None])
    total = tl.sum(e, axis=1)
    block_lse = reference + tl.log2(total)
    offs_block = pid_v.to(tl.int64) * rows + offs_t
    tl.store(block_lse_ptr + offs_block, block_lse, mask=mask_t)
    if WRITES_WEIGHTS:
        e *= tl.exp2(reference - whole_bits(block_lse))[:, None]
        if HAS_SOFTCAP:
            e *= slope
        weights_ptrs = weights_ptr + offs_t.to(tl.int64)[:, None] * stride_et + offs_v[None, :]
        tl.store(weights_ptrs, e.to(weights_ptr.dtype.element_ty), mask=mask_t[:, None])


@triton.jit(do_not_specialize=["rows", "blocks"])
def fold_block_lse_kernel(
    # data
    block_lse_ptr,  # [blocks, R]
    before_ptr,  # [R]
    after_ptr,  # [R] out
    # sizes
    rows,
    blocks,
    BLOCK_T: tl.constexpr,
):
    """After = logsumexp of before and of all blocks, in bits, always in the same order."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < rows
    before = tl.load(before_ptr + offs_t, mask=mask_t, other=0.0)
    largest = before
    for block in range(blocks):
        offs = tl.cast(block, tl.int64) * rows + offs_t
        largest = tl.maximum(largest, tl.load(block_lse_ptr + offs, mask=mask_t, other=0.0))
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.exp2(before - reference)
    for block in range(blocks):
        offs = tl.cast(block, tl.int64) * rows + offs_t
        total += tl.exp2(tl.load(block_lse_ptr + offs, mask=mask_t, other=0.0) - reference)
    tl.store(after_ptr + offs_t, reference + tl.log2(total), mask=mask_t)


@triton.jit(do_not_specialize=["rows", "columns"])
def add_weighted_rows_kernel(
    # data
    weights_ptr,  # [R, C rounded up to blocks]
    weight_ptr,  # [C, D]
    total_ptr,  # [R, D] fp32, in and out
    block_lse_ptr,  # [blocks, R] bits
    before_ptr,  # [R] bits, what total refers to on entry
    after_ptr,  # [R] bits, what it refers to on exit
    # sizes
    rows,
    columns,
    width,
    # strides
    stride_et,
    stride_wv,
    stride_wd,
    stride_ut,
    IS_FIRST: tl.constexpr,
    IS_RELATIVE: tl.constexpr,
    HEADROOM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Total += e @ W over one chunk of the vocabulary, with e moved to a common reference."""
    pid_t, pid_d = tile_of_program(rows, width, BLOCK_T, BLOCK_D, GROUP)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    row = tl.minimum(offs_t, rows - 1).to(tl.int64)
    mask_d = offs_d < width
    weights_ptrs = weights_ptr + row[:, None] * stride_et + offs_c[None, :]
    weight_ptrs = weight_ptr + (
        offs_c.to(tl.int64)[:, None] * stride_wv + offs_d.to(tl.int64)[None, :] * stride_wd
    )
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    reference = tl.zeros((BLOCK_T,), dtype=tl.float32)
    if IS_RELATIVE:
        reference = whole_bits(tl.load(after_ptr + row)) - HEADROOM
    for c in range(0, columns, BLOCK_C):
        # Past the chunk's end e is 0, and so is what it meets.
        e = tl.load(weights_ptrs)
        w = tl.load(weight_ptrs, mask=(offs_c < columns - c)[:, None] & mask_d[None, :], other=0.0)
        if INTERPRETED:
            e = e.to(tl.float32)
            w = w.to(tl.float32)
        if IS_RELATIVE:
            lse = tl.load(block_lse_ptr + tl.cast(c // BLOCK_V, tl.int64) * rows + row)
            moved = tl.exp2(whole_bits(lse) - reference)
            e = e * tl.where(lse == float("-inf"), 0.0, moved).to(e.dtype)[:, None]
        acc = tl.dot(e, w, acc, input_precision=PRECISION)
        weights_ptrs += BLOCK_C
        weight_ptrs += tl.cast(BLOCK_C, tl.int64) * stride_wv
    mask = (offs_t < rows)[:, None] & mask_d[None, :]
    total_ptrs = total_ptr + row[:, None] * stride_ut + offs_d[None, :]
    if not IS_FIRST:
        before = tl.load(total_ptrs, mask=mask, other=0.0)
        if IS_RELATIVE:
            lse = tl.load(before_ptr + row)
            # A sum that was empty is 0, and exp2 of whatever it referred to may be inf.
            moved = tl.exp2(whole_bits(lse) - HEADROOM - reference)
            before *= tl.where(lse == float("-inf"), 0.0, moved)[:, None]
        acc += before
    tl.store(total_ptrs, acc, mask=mask)


@triton.jit(do_not_specialize=["vocabulary"])
def direction_kernel(
    # data
    total_ptr,  # [R, D] fp32, sum of e * W, referring to lse
    weight_ptr,  # [V, D]
    target_ptr,  # [R]
    target_slope_ptr,  # [R]
    lse_ptr,  # [R] bits
    direction_ptr,  # [R, D] out
    # sizes
    vocabulary,
    width,
    # strides
    stride_ut,
    stride_wv,
    stride_wd,
    stride_gt,
    # transform
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    HEADROOM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Direction = scale * (slope * W[y] - mean of the rest's rows): d logp / d hidden over q."""
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < width
    lse = tl.load(lse_ptr + t)
    target = tl.load(target_ptr + t)
    # Outside the vocabulary nothing may be read, and the row is NaN like its log-probability.
    inside = tl.minimum(tl.maximum(target, 0), vocabulary - 1)
    own_ptrs = weight_ptr + inside * stride_wv + offs_d.to(tl.int64) * stride_wd
    own = tl.load(own_ptrs, mask=mask, other=0.0).to(tl.float32)
    own = tl.where(target == inside, own, float("nan"))
    if HAS_SOFTCAP:
        own *= tl.load(target_slope_ptr + t)
    factor = tl.where(lse == float("-inf"), 0.0, tl.exp2(whole_bits(lse) - HEADROOM - lse))
    mean = tl.load(total_ptr + t * stride_ut + offs_d, mask=mask, other=0.0) * factor
    out_ptrs = direction_ptr + t * stride_gt + offs_d
    tl.store(out_ptrs, (logit_scale * (own - mean)).to(direction_ptr.dtype.element_ty), mask=mask)
