"""Eager definitions of the log-probabilities and of the ORPO loss: what "correct" means here.

Every other backend is tested against these two functions in fp64. They materialise the full
logits and loop over completions in Python, so they are for tests and for reading.

Legend: M scored rows, D hidden size, V vocabulary, P pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logprobs_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target from full logits, accurate where the model is sure of it.

    Args:
        logits: [M, V], already transformed; half precision is raised to fp32.
        targets: [M] int64 token ids.

    Returns:
        [M] fp32 log-probabilities (fp64 for fp64 logits).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    column = targets.unsqueeze(1)
    target_logit = logits.gather(1, column).squeeze(1)
    rest = torch.logsumexp(logits.scatter(1, column, float("-inf")), dim=1)
    return -F.softplus(rest - target_logit, threshold=60.0)


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Log-probability of each target, from full logits.

    With z the transformed logits and r = logsumexp of z without the target's column,
    log p = -softplus(r - z_target): relative accuracy survives p -> 1, where
    logsumexp(z) - z_target cancels.

    Args:
        hidden: [M, D] hidden states.
        weight: [V, D] LM head.
        targets: [M] int64 token ids, or `ignore_index`.
        bias: [V], added before the scale.
        logit_scale: factor on the logits.
        softcap: `cap * tanh(z / cap)` after the scale.
        ignore_index: rows with this target get 0 and no gradient; None: every row counts.

    Returns:
        [M] fp32 log-probabilities (fp64 for fp64 inputs).
    """
    keep = torch.ones_like(targets, dtype=torch.bool)
    if ignore_index is not None:
        keep = targets != ignore_index
    logits = F.linear(hidden[keep], weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.zeros(targets.shape, dtype=logits.dtype, device=logits.device)
    return logps.masked_scatter(keep, logprobs_from_logits(logits, targets[keep]))


def orpo_loss_reference(
    logps: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    *,
    pair_count: int,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """ORPO's loss from token log-probabilities, one completion at a time.

    Equations 4 to 7 of arXiv 2403.07691, written as they stand there; accurate in fp64 only.

    Args:
        logps: [M] token log-probabilities.
        completion_ids: [M], 2n for the chosen and 2n+1 for the rejected tokens of pair n.
        nll_mask: [M] bool, tokens of the NLL term.
        pair_count: P.
        alpha: weight of the odds-ratio term (the paper's lambda).
        temperature: factor on the log odds ratio.

    Returns:
        The scalar loss.
    """
    odds_ratio_terms = []
    for pair in range(pair_count):
        log_odds = []
        for completion in (2 * pair, 2 * pair + 1):
            mean_logp = logps[completion_ids == completion].mean()
            log_odds.append(mean_logp - torch.log(-torch.expm1(mean_logp)))
        odds_ratio_terms.append(-F.logsigmoid(temperature * (log_odds[0] - log_odds[1])))
    nll = -logps[nll_mask].mean()
    return nll + alpha * torch.stack(odds_ratio_terms).mean()
