"""DPO, IPO, SimPO, CPO and SFT, from log-probabilities. One value a pair; nothing is averaged.

Legend: P pairs; pi the model, ref the reference; y_w the chosen and y_l the rejected completion.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation, arXiv 2305.18290, equation 7.

    -log sigmoid(beta * [log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)])

    Args:
        chosen: [P] log-probability of each chosen completion, summed over its tokens.
        rejected: [P] the same of the rejected ones.
        reference_chosen: [P] by the reference model.
        reference_rejected: [P] by the reference model.
        beta: how much a deviation from the reference is to count; TRL's `beta`.

    Returns:
        [P].
    """
    log_ratios = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * log_ratios)


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimisation, arXiv 2310.12036, equation 17.

    ([log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)] - 1 / (2 beta))^2, with *means* over each
    completion's tokens, which the paper does not spell out and TRL does.

    Args:
        chosen: [P] mean log-probability over the tokens of each chosen completion.
        rejected: [P] the same of the rejected ones.
        reference_chosen: [P] by the reference model.
        reference_rejected: [P] by the reference model.
        beta: the paper's tau; the margin that is aimed at is 1 / (2 beta).

    Returns:
        [P].
    """
    log_ratios = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (log_ratios - 1 / (2 * beta)).square()


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """Simple preference optimisation, arXiv 2405.14734, equation 6.

    -log sigmoid(beta * (mean log pi(y_w) - mean log pi(y_l)) - gamma)

    Args:
        chosen: [P] mean log-probability over the tokens of each chosen completion.
        rejected: [P] the same of the rejected ones.
        beta: scale of the reward; the paper takes 2 to 2.5.
        gamma: the margin that is aimed at; the paper takes 0.3 to 1.6. TRL's `simpo_gamma`.

    Returns:
        [P].
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def cpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The preference term of contrastive preference optimisation, L_prefer of arXiv 2401.08417.

    -log sigmoid(beta * (log pi(y_w) - log pi(y_l))). The paper adds the NLL of the chosen
    completions (`sft_loss`).

    Args:
        chosen: [P] log-probability of each chosen completion, summed over its tokens.
        rejected: [P] the same of the rejected ones.
        beta: scale of the difference.

    Returns:
        [P].
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def sft_loss(logps: Tensor, nll_mask: Tensor) -> Tensor:
    """Negative log-likelihood, summed over tokens. Its mean is supervised fine-tuning.

    Args:
        logps: [M] token log-probabilities.
        nll_mask: [M] bool, the tokens that count.

    Returns:
        Scalar.
    """
    return -logps.masked_fill(~nll_mask, 0.0).sum()
