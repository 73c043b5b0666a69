"""Public: the ORPO loss from token log-probabilities, and from hidden states and an LM head.

`orpo_loss` holds the formula (on a GPU with Triton, `fused_orpo.py` computes it); `fused_orpo_loss`
puts `fused_linear_logprobs` before it. How sequences become rows, and what a step is normalised
by, is the caller's business.

Legend: M scored rows, D hidden size, V vocabulary, P pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import select_backend
from .gradient_filter import GradientFilter
from .linear_logprobs import DEFAULT_WORKSPACE_BYTES, fused_linear_logprobs
from .orpo_ops import differentiable_orpo_terms

# Below this a completion's mean nll no longer moves: 1 / a stays finite in fp32, and the tokens'
# own 1 - p, which is multiplied with it, has long underflowed to 0.
MIN_MEAN_NLL = 1e-35


class ORPOLoss(NamedTuple):
    """The loss and what it was made of. Per-pair entries are detached from nothing."""

    loss: Tensor
    """Scalar, nll + alpha * odds_ratio_loss."""
    nll: Tensor
    """Scalar, summed negative log-likelihood over `nll_normalizer`."""
    odds_ratio_loss: Tensor
    """Scalar, summed -log sigmoid(temperature * log_odds) over `pair_normalizer`."""
    chosen_logps: Tensor
    """[P] mean token log-probability of each chosen completion."""
    rejected_logps: Tensor
    """[P] mean token log-probability of each rejected completion."""
    log_odds: Tensor
    """[P] log odds of chosen minus log odds of rejected."""


def orpo_loss(
    logps: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    *,
    pair_count: int,
    alpha: float = 0.1,
    temperature: float = 1.0,
    pair_normalizer: Tensor | float | None = None,
    nll_normalizer: Tensor | float | None = None,
    backend: str = "auto",
) -> ORPOLoss:
    """ORPO's loss, arXiv 2403.07691 equations 4 to 7, from token log-probabilities.

    With a = mean over a completion's tokens of -log p (eq. 4's average log-likelihood),
    log odds = -a - log(1 - exp(-a)) (eq. 4), and
    loss = NLL + alpha * -log sigmoid(temperature * (log odds chosen - log odds rejected))
    (eqs. 6 and 7; alpha is the paper's lambda). Finite, with a finite gradient, however sure the
    model is of either completion.

    Args:
        logps: [M] token log-probabilities, fp32 or fp64; half precision is raised to fp32, where
            1 / (1 - p) has room.
        completion_ids: [M] int64; 2n marks the chosen, 2n+1 the rejected tokens of pair n,
            -1 a token of neither.
        nll_mask: [M] bool, the tokens of the NLL term.
        pair_count: P. Given apart from the normaliser because it is the length of the outputs,
            and reading it off `completion_ids` would wait for the GPU.
        alpha: strength of the odds-ratio term; `beta` in TRL, `orpo_alpha` in the course.
        temperature: factor on the log odds ratio; `orpo_beta` in the course.
        pair_normalizer: what the odds-ratio terms are divided by; default P. A trainer passes
            the pairs of the whole optimiser step.
        nll_normalizer: what the NLL is divided by; default the tokens in `nll_mask`.
        backend: "auto", "triton" (fp32), or "chunked" and "reference", which are both plain
            PyTorch here; see `select_backend`.

    Returns:
        An `ORPOLoss`. A pair one of whose completions has no token here adds nothing to the
        loss, and its entries are 0.

    Raises:
        ValueError: the shapes do not fit, `pair_count` is negative, or (on the CPU) a completion
            id belongs to no pair.
    """
    if logps.ndim != 1:
        raise ValueError(f"logps must be [M], found {tuple(logps.shape)}")
    _check("logps", logps, completion_ids, nll_mask, pair_count)
    logps = logps if logps.dtype == torch.float64 else logps.float()
    pairs = max(pair_count, 1) if pair_normalizer is None else pair_normalizer
    tokens = nll_mask.sum().clamp_min(1) if nll_normalizer is None else nll_normalizer
    if select_backend(logps.device, backend, logps.dtype).name == "triton":
        terms = differentiable_orpo_terms(
            logps,
            completion_ids,
            nll_mask,
            pair_normalizer=_scalar(pairs, logps),
            nll_normalizer=_scalar(tokens, logps),
            pair_count=pair_count,
            alpha=float(alpha),
            temperature=float(temperature),
        )
        return ORPOLoss(*terms)
    token_nll = -logps
    mean_nll, lengths = _mean_per_completion(token_nll, completion_ids, 2 * pair_count)
    is_whole = (lengths[0::2] > 0) & (lengths[1::2] > 0)
    log_odds_of_completion = _log_odds(mean_nll)
    log_odds = log_odds_of_completion[0::2] - log_odds_of_completion[1::2]
    zero = torch.zeros_like(log_odds)
    log_odds = torch.where(is_whole, log_odds, zero)
    odds_ratio_terms = torch.where(is_whole, -F.logsigmoid(temperature * log_odds), zero)
    odds_ratio_loss = odds_ratio_terms.sum() / pairs
    nll = torch.where(nll_mask, token_nll, torch.zeros_like(token_nll)).sum() / tokens
    return ORPOLoss(
        loss=nll + alpha * odds_ratio_loss,
        nll=nll,
        odds_ratio_loss=odds_ratio_loss,
        chosen_logps=torch.where(is_whole, -mean_nll[0::2], zero),
        rejected_logps=torch.where(is_whole, -mean_nll[1::2], zero),
        log_odds=log_odds,
    )


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar on the device of `like`; filled there, since a copy from the host would wait."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype).reshape(())
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def _check(
    name: str, rows: Tensor, completion_ids: Tensor, nll_mask: Tensor, pair_count: int
) -> None:
    if not rows.shape == completion_ids.shape == nll_mask.shape:
        raise ValueError(
            f"{name}, completion_ids and nll_mask must be shaped alike: "
            f"{tuple(rows.shape)}, {tuple(completion_ids.shape)}, {tuple(nll_mask.shape)}"
        )
    if nll_mask.dtype != torch.bool:
        raise ValueError(f"nll_mask must be bool, found {nll_mask.dtype}")
    if pair_count < 0:
        raise ValueError(f"pair_count must not be negative, found {pair_count}")
    # On other devices looking would wait for the device; a compiled graph must not look either.
    looks = completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and completion_ids.numel():
        highest = int(completion_ids.max())
        if highest >= 2 * pair_count:
            raise ValueError(
                f"completion id {highest} belongs to no pair: pair_count is {pair_count}, "
                f"so ids end at {2 * pair_count - 1}"
            )


def _mean_per_completion(
    token_nll: Tensor, completion_ids: Tensor, completions: int
) -> tuple[Tensor, Tensor]:
    """Mean nll [2P] and length [2P] of each completion; 1 where a completion has no token."""
    # One extra slot swallows the tokens of no completion, without a mask that changes shapes.
    slot = torch.where(completion_ids < 0, completions, completion_ids)
    sums = token_nll.new_zeros(completions + 1).index_add(0, slot, token_nll)[:completions]
    ones = torch.ones_like(token_nll)
    lengths = token_nll.new_zeros(completions + 1).index_add(0, slot, ones)[:completions]
    mean = sums / lengths.clamp_min(1)
    return torch.where(lengths > 0, mean, torch.ones_like(mean)), lengths


def _log_odds(mean_nll: Tensor) -> Tensor:
    """Return log p / (1 - p) with p = exp(-mean_nll); expm1 keeps 1 - p exact where p is near 1."""
    a = mean_nll.clamp_min(MIN_MEAN_NLL)
    return -a - torch.log(-torch.expm1(-a))


def fused_orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    *,
    pair_count: int,
    alpha: float = 0.1,
    temperature: float = 1.0,
    pair_normalizer: Tensor | float | None = None,
    nll_normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    gradient_filter: GradientFilter | None = None,
) -> ORPOLoss:
    """ORPO's loss straight from hidden states and an LM head, without the logits tensor.

    Args:
        hidden: [..., D] hidden states of the rows that are scored.
        weight: [V, D] LM head.
        targets: [...] int64, the token each row predicts, or `ignore_index`.
        completion_ids: [...] int64; 2n chosen, 2n+1 rejected tokens of pair n, -1 neither.
        nll_mask: [...] bool, the rows of the NLL term.
        pair_count: P, the number of pairs.
        alpha: see `orpo_loss`.
        temperature: see `orpo_loss`.
        pair_normalizer: see `orpo_loss`.
        nll_normalizer: see `orpo_loss`.
        bias: see `fused_linear_logprobs`.
        low_rank: see `fused_linear_logprobs`.
        logit_scale: see `fused_linear_logprobs`.
        softcap: see `fused_linear_logprobs`.
        ignore_index: rows with this target count in no completion and in no NLL; None: there
            are none.
        backend: see `fused_linear_logprobs`.
        workspace_bytes: see `fused_linear_logprobs`.
        gradient_filter: see `fused_linear_logprobs`.

    Returns:
        An `ORPOLoss`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit each other.
        IndexError: a target on the CPU lies outside [0, V).
        ModuleNotFoundError: `backend="triton"` where Triton is not installed.
    """
    # Before the expensive part, and before torch.where would broadcast what does not fit.
    _check("targets", targets, completion_ids, nll_mask, pair_count)
    logps = fused_linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        low_rank=low_rank,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        backend=backend,
        workspace_bytes=workspace_bytes,
        gradient_filter=gradient_filter,
    )
    if ignore_index is not None:
        is_scored = targets != ignore_index
        completion_ids = torch.where(is_scored, completion_ids, -torch.ones_like(completion_ids))
        nll_mask = nll_mask & is_scored
    return orpo_loss(
        logps.reshape(-1),
        completion_ids.reshape(-1),
        nll_mask.reshape(-1),
        pair_count=pair_count,
        alpha=alpha,
        temperature=temperature,
        pair_normalizer=pair_normalizer,
        nll_normalizer=nll_normalizer,
        backend=backend,
    )
