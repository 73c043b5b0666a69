"""What a step or an evaluation reports: sums over pairs and tokens, then TRL's metric names.

Sums add up over row batches, ranks and batches of an evaluation, so the figures do not depend
on how the work was cut. Where they come from and where they go is the trainer's business.
"""

import torch
from torch import Tensor

from .losses.objective import Objective, RowLoss

_PARTS = (
    "nll",
    "preference",
    "chosen_logps",
    "rejected_logps",
    "accuracy",
    "log_odds",
    "chosen_scores",
    "rejected_scores",
)


def loss_parts(loss: RowLoss, pair_normalizer: float) -> Tensor:
    """The detached parts [8] of one row batch, divided by the given normaliser.

    The NLL and the preference term are taken as they are: the loss has divided them already.
    """
    per_pair = torch.stack(
        [
            loss.chosen_logps.sum(),
            loss.rejected_logps.sum(),
            (loss.chosen_scores > loss.rejected_scores).to(loss.log_odds.dtype).sum(),
            loss.log_odds.sum(),
            loss.chosen_scores.sum(),
            loss.rejected_scores.sum(),
        ]
    )
    of_step = torch.stack([loss.nll.detach(), loss.preference.detach()])
    return torch.cat([of_step, per_pair / pair_normalizer])


def named_metrics(
    parts: list[float], objective: Objective, *, has_rejected: bool = True
) -> dict[str, float]:
    """TRL's metric names from the averaged parts.

    `logps/` are means over tokens or sums, as the loss has them (in TRL too). A reward is what the
    loss compares, a log-probability or its ratio to the reference's, times its factor; a
    margin is the difference of two rewards.

    Args:
        parts: averages.
        objective: the run's.
        has_rejected: whether the rejected completions were scored.
    """
    values = dict(zip(_PARTS, parts, strict=True))
    scale = objective.reward_scale
    if not has_rejected:
        return {"logps/chosen": values["chosen_logps"], "nll_loss": values["nll"]}
    chosen, rejected = values["chosen_scores"], values["rejected_scores"]
    metrics = {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/accuracies": values["accuracy"],
        "rewards/margins": scale * (chosen - rejected),
        "logps/chosen": values["chosen_logps"],
        "logps/rejected": values["rejected_logps"],
        "nll_loss": values["nll"],
    }
    if objective.loss_type == "orpo":
        metrics["log_odds_ratio"] = -values["preference"]
    return {**metrics, "log_odds_chosen": values["log_odds"]}


def metrics_of_set(
    parts: Tensor, tokens: float, pairs: float, objective: Objective
) -> dict[str, float]:
    """Loss and metrics of a whole set, from sums over all of its row batches.

    Args:
        parts: [8], sums of `loss_parts` with normalisers of 1.
        tokens: tokens of the NLL term in the set.
        pairs: pairs of the set.
        objective: the run's.
    """
    divisors = [max(tokens, 1.0)] + [max(pairs, 1.0)] * (len(_PARTS) - 1)
    averages = [part / divisor for part, divisor in zip(parts.tolist(), divisors, strict=True)]
    values = dict(zip(_PARTS, averages, strict=True))
    loss = objective.nll_weight * values["nll"] + objective.preference_weight * values["preference"]
    return {"loss": loss, **named_metrics(averages, objective)}


def empty_parts(device: torch.device) -> Tensor:
    """Zeros [8] to add parts to."""
    # A sum over a large evaluation set needs the digits; MPS has no fp64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(len(_PARTS), dtype=dtype, device=device)
