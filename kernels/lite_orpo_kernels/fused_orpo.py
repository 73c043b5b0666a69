"""The odds-ratio loss in Triton, from token log-probabilities: the formula of `orpo.py` again.

One program a pair reads all tokens and picks out its own, so that a completion's tokens may lie
anywhere and nothing is added atomically; one program sums the tokens of the NLL term and the
pairs. The backward pass is one kernel over the tokens. It exists so that a step's loss on a GPU
is three kernels of ours instead of some forty of torch's; `orpo.py` defines it, and tests hold
the two together.

Legend: M scored rows (one block: t), P pairs, n a pair, a = mean nll of a completion (>= 0).
Numerics: expm1 and log1p are not on every Triton target, so both are written out here, to a few
fp32 roundings also where their argument is tiny.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 1024
PAIRS = 128
# Below this a completion's mean nll no longer moves: see `orpo.MIN_MEAN_NLL`.
MIN_MEAN_NLL = tl.constexpr(1e-35)


@triton.jit
def _one_minus_exp(a):
    """1 - exp(-a) for a >= 0, with all its digits where a is small."""
    series = 1.0 - a * (1.0 / 10.0)
    for k in tl.static_range(9, 1, -1):
        series = 1.0 - a * (1.0 / k) * series
    return tl.where(a < 0.5, a * series, 1.0 - tl.exp(-a))


@triton.jit
def _log1p(e):
    """Return log(1 + e) for e in [0, 1], by 2 artanh(e / (2 + e))."""
    s = e / (2.0 + e)
    square = s * s
    series = tl.zeros_like(s) + 1.0 / 17.0
    for k in tl.static_range(15, 0, -2):
        series = series * square + 1.0 / k
    return 2.0 * s * series


@triton.jit
def _log_odds(a):
    """Log p / (1 - p) with p = exp(-a), and its derivative with respect to -a, 1 / (1 - p)."""
    safe = tl.maximum(a, MIN_MEAN_NLL)
    miss = _one_minus_exp(safe)
    return -safe - tl.log(miss), tl.where(a < MIN_MEAN_NLL, 0.0, 1.0 / miss)


@triton.jit(do_not_specialize=["rows"])
def pair_kernel(
    # data
    logps_ptr,  # [M] fp32
    completion_ptr,  # [M] int64
    chosen_ptr,  # [P] out, mean log-probability
    rejected_ptr,  # [P] out
    log_odds_ptr,  # [P] out
    term_ptr,  # [P] out, -log sigmoid(temperature * log odds)
    slope_ptr,  # [5, P] out: what the backward pass multiplies with
    # sizes
    rows,
    pairs,
    temperature,
    TOKENS: tl.constexpr,
):
    """One pair: means over its completions' tokens, log odds, loss term, slopes."""
    n = tl.program_id(0)
    offs = tl.arange(0, TOKENS)
    sum_chosen = tl.zeros((TOKENS,), dtype=tl.float32)
    sum_rejected = tl.zeros((TOKENS,), dtype=tl.float32)
    count_chosen = tl.zeros((TOKENS,), dtype=tl.float32)
    count_rejected = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, rows, TOKENS):
        mask = start + offs < rows
        completion = tl.load(completion_ptr + start + offs, mask=mask, other=-1)
        nll = -tl.load(logps_ptr + start + offs, mask=mask, other=0.0)
        is_chosen = completion == 2 * n
        is_rejected = completion == 2 * n + 1
        sum_chosen += tl.where(is_chosen, nll, 0.0)
        sum_rejected += tl.where(is_rejected, nll, 0.0)
        count_chosen += tl.where(is_chosen, 1.0, 0.0)
        count_rejected += tl.where(is_rejected, 1.0, 0.0)
    length_chosen = tl.sum(count_chosen, axis=0)
    length_rejected = tl.sum(count_rejected, axis=0)
    is_whole = tl.minimum(length_chosen, length_rejected) > 0.0
    share_chosen = tl.where(is_whole, 1.0 / tl.maximum(length_chosen, 1.0), 0.0)
    share_rejected = tl.where(is_whole, 1.0 / tl.maximum(length_rejected, 1.0), 0.0)
    # A pair without one of its completions counts nowhere; 1 keeps its log odds finite.
    a_chosen = tl.where(is_whole, tl.sum(sum_chosen, axis=0) * share_chosen, 1.0)
    a_rejected = tl.where(is_whole, tl.sum(sum_rejected, axis=0) * share_rejected, 1.0)
    odds_chosen, slope_chosen = _log_odds(a_chosen)
    odds_rejected, slope_rejected = _log_odds(a_rejected)
    log_odds = odds_chosen - odds_rejected
    x = temperature * log_odds
    small = tl.exp(-tl.abs(x))
    term = _log1p(small) - tl.minimum(x, 0.0)
    pull = temperature * tl.where(x < 0.0, 1.0, small) / (1.0 + small)
    tl.store(chosen_ptr + n, tl.where(is_whole, -a_chosen, 0.0))
    tl.store(rejected_ptr + n, tl.where(is_whole, -a_rejected, 0.0))
    tl.store(log_odds_ptr + n, tl.where(is_whole, log_odds, 0.0))
    tl.store(term_ptr + n, tl.where(is_whole, term, 0.0))
    tl.store(slope_ptr + n, share_chosen)
    tl.store(slope_ptr + pairs + n, share_rejected)
    tl.store(slope_ptr + 2 * pairs + n, share_chosen * slope_chosen)
    tl.store(slope_ptr + 3 * pairs + n, share_rejected * slope_rejected)
    tl.store(slope_ptr + 4 * pairs + n, tl.where(is_whole, pull, 0.0))


@triton.jit(do_not_specialize=["rows", "pairs"])
def total_kernel(
    # data
    logps_ptr,  # [M]
    nll_mask_ptr,  # [M] uint8
    term_ptr,  # [P]
    nll_normalizer_ptr,  # []
    pair_normalizer_ptr,  # []
    loss_ptr,  # [] out
    nll_ptr,  # [] out
    odds_ratio_loss_ptr,  # [] out
    # sizes
    rows,
    pairs,
    alpha,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The three scalars, by one program and in one order."""
    offs = tl.arange(0, TOKENS)
    token_sum = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, rows, TOKENS):
        mask = start + offs < rows
        counts = tl.load(nll_mask_ptr + start + offs, mask=mask, other=0) != 0
        logp = tl.load(logps_ptr + start + offs, mask=mask, other=0.0)
        token_sum += tl.where(counts, -logp, 0.0)
    offs_p = tl.arange(0, PAIRS)
    pair_sum = tl.zeros((PAIRS,), dtype=tl.float32)
    for start in range(0, pairs, PAIRS):
        mask_p = start + offs_p < pairs
        pair_sum += tl.load(term_ptr + start + offs_p, mask=mask_p, other=0.0)
    nll = tl.sum(token_sum, axis=0) / tl.load(nll_normalizer_ptr)
    odds_ratio_loss = tl.sum(pair_sum, axis=0) / tl.load(pair_normalizer_ptr)
    tl.store(nll_ptr, nll)
    tl.store(odds_ratio_loss_ptr, odds_ratio_loss)
    tl.store(loss_ptr, nll + alpha * odds_ratio_loss)


@triton.jit(do_not_specialize=["rows"])
def token_gradient_kernel(
    # data
    completion_ptr,  # [M]
    nll_mask_ptr,  # [M] uint8
    slope_ptr,  # [5, P]
    nll_normalizer_ptr,  # []
    pair_normalizer_ptr,  # []
    grad_loss_ptr,  # []
    grad_nll_ptr,  # []
    grad_odds_ratio_loss_ptr,  # []
    grad_chosen_ptr,  # [P]
    grad_rejected_ptr,  # [P]
    grad_log_odds_ptr,  # [P]
    grad_logps_ptr,  # [M] out
    # sizes
    rows,
    pairs,
    alpha,
    TOKENS: tl.constexpr,
):
    """The gradient of every output with respect to the tokens' log-probabilities, added up."""
    offs = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = offs < rows
    completion = tl.load(completion_ptr + offs, mask=mask, other=-1)
    is_paired = mask & (completion >= 0) & (completion < 2 * pairs)
    n = tl.where(is_paired, completion // 2, 0)
    is_chosen = completion % 2 == 0
    grad_loss = tl.load(grad_loss_ptr)
    grad_term = alpha * grad_loss + tl.load(grad_odds_ratio_loss_ptr)
    grad_term /= tl.load(pair_normalizer_ptr)
    pull = tl.load(slope_ptr + 4 * pairs + n, mask=is_paired, other=0.0)
    # d term / d log odds = -temperature * sigmoid(-temperature * log odds)
    grad_odds = tl.load(grad_log_odds_ptr + n, mask=is_paired, other=0.0) - grad_term * pull
    grad_chosen = tl.load(grad_chosen_ptr + n, mask=is_paired, other=0.0)
    grad_rejected = tl.load(grad_rejected_ptr + n, mask=is_paired, other=0.0)
    share_chosen = tl.load(slope_ptr + n, mask=is_paired, other=0.0)
    share_rejected = tl.load(slope_ptr + pairs + n, mask=is_paired, other=0.0)
    slope_chosen = tl.load(slope_ptr + 2 * pairs + n, mask=is_paired, other=0.0)
    slope_rejected = tl.load(slope_ptr + 3 * pairs + n, mask=is_paired, other=0.0)
    gradient = tl.where(
        is_chosen,
        grad_chosen * share_chosen + grad_odds * slope_chosen,
        grad_rejected * share_rejected - grad_odds * slope_rejected,
    )
    counts = tl.load(nll_mask_ptr + offs, mask=mask, other=0) != 0
    grad_token = (grad_loss + tl.load(grad_nll_ptr)) / tl.load(nll_normalizer_ptr)
    gradient = tl.where(is_paired, gradient, 0.0) - tl.where(counts, grad_token, 0.0)
    tl.store(grad_logps_ptr + offs, gradient, mask=mask)


class ORPOTerms(NamedTuple):
    """What the kernels make: `orpo.ORPOLoss` field by field, and what the backward pass needs."""

    loss: Tensor  # []
    nll: Tensor  # []
    odds_ratio_loss: Tensor  # []
    chosen_logps: Tensor  # [P]
    rejected_logps: Tensor  # [P]
    log_odds: Tensor  # [P]
    slopes: Tensor  # [5, P]


class ORPOInputs(NamedTuple):
    """Tensors of one call; all contiguous, on one device."""

    completion_ids: Tensor  # [M] int64
    nll_mask: Tensor  # [M] uint8
    pair_normalizer: Tensor  # [] fp32
    nll_normalizer: Tensor  # [] fp32


def triton_orpo_terms(
    logps: Tensor, inputs: ORPOInputs, pair_count: int, alpha: float, temperature: float
) -> ORPOTerms:
    """Launch the forward kernels on logps [M] fp32, contiguous."""
    loss, nll, odds_ratio_loss = (logps.new_empty(()) for _ in range(3))
    chosen, rejected, log_odds, term = (logps.new_empty(pair_count) for _ in range(4))
    slopes = logps.new_empty(5, pair_count)
    rows = logps.shape[0]
    if pair_count:
        pair_kernel[(pair_count,)](
            logps,
            inputs.completion_ids,
            chosen,
            rejected,
            log_odds,
            term,
            slopes,
            rows,
            pair_count,
            temperature,
            TOKENS=TOKENS,
            enable_fp_fusion=True,
        )
    total_kernel[(1,)](
        logps,
        inputs.nll_mask,
        term,
        inputs.nll_normalizer,
        inputs.pair_normalizer,
        loss,
        nll,
        odds_ratio_loss,
        rows,
        pair_count,
        alpha,
        TOKENS=TOKENS,
        PAIRS=PAIRS,
        enable_fp_fusion=True,
    )
    return ORPOTerms(loss, nll, odds_ratio_loss, chosen, rejected, log_odds, slopes)


def triton_orpo_gradient(
    inputs: ORPOInputs, slopes: Tensor, gradients: list[Tensor], alpha: float
) -> Tensor:
    """Return d / d logps [M]; `gradients` are those of the outputs, in the order of `ORPOTerms`."""
    rows, pair_count = inputs.completion_ids.shape[0], slopes.shape[1]
    grad_logps = slopes.new_empty(rows)
    if rows:
        token_gradient_kernel[(triton.cdiv(rows, TOKENS),)](
            inputs.completion_ids,
            inputs.nll_mask,
            slopes,
            inputs.nll_normalizer,
            inputs.pair_normalizer,
            *(gradient.contiguous() for gradient in gradients),
            grad_logps,
            rows,
            pair_count,
            alpha,
            TOKENS=TOKENS,
            enable_fp_fusion=True,
        )
    return grad_logps
