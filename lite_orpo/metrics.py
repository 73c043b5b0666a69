"""What a step or an evaluation reports: sums over pairs and tokens, then TRL's metric names.

Sums add up over row batches, ranks and batches of an evaluation, so the figures do not depend
on how the work was cut. Where they come from and where they go is the trainer's business.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .loss import ORPOLoss


class LossScale(NamedTuple):
    """The two factors of the odds-ratio term."""

    weight: float
    temperature: float


_PARTS = ("nll", "odds_ratio_loss", "chosen_logps", "rejected_logps", "accuracy", "log_odds")


def loss_parts(loss: ORPOLoss, pair_normalizer: float) -> Tensor:
    """The detached parts [6] of one row batch, divided by the given normaliser.

    `nll` and `odds_ratio_loss` are taken as they are: the loss has divided them already.
    """
    chosen, rejected = loss.chosen_logps.detach(), loss.rejected_logps.detach()
    per_pair = torch.stack(
        [
            chosen.sum(),
            rejected.sum(),
            (chosen > rejected).to(chosen.dtype).sum(),
            loss.log_odds.detach().sum(),
        ]
    )
    return torch.cat(
        [
            torch.stack([loss.nll.detach(), loss.odds_ratio_loss.detach()]),
            per_pair / pair_normalizer,
        ]
    )


def named_metrics(parts: list[float], scale: LossScale) -> dict[str, float]:
    """TRL's metric names from the averaged parts.

    A reward is the mean log-probability times the strength of the odds-ratio term, as in TRL
    (there with temperature 1); a margin is the difference of two rewards.
    """
    values = dict(zip(_PARTS, parts, strict=True))
    reward = scale.weight * scale.temperature
    chosen, rejected = values["chosen_logps"], values["rejected_logps"]
    return {
        "rewards/chosen": reward * chosen,
        "rewards/rejected": reward * rejected,
        "rewards/accuracies": values["accuracy"],
        "rewards/margins": reward * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": values["nll"],
        "log_odds_ratio": -values["odds_ratio_loss"],
        "log_odds_chosen": values["log_odds"],
    }


def metrics_of_set(
    parts: Tensor, tokens: float, pairs: float, scale: LossScale
) -> dict[str, float]:
    """Loss and metrics of a whole set, from sums over all of its row batches.

    Args:
        parts: [6], sums of `loss_parts` with normalisers of 1.
        tokens: tokens of the NLL term in the set.
        pairs: pairs of the set.
        scale: the factors of the odds-ratio term.
    """
    divisors = [max(tokens, 1.0)] + [max(pairs, 1.0)] * (len(_PARTS) - 1)
    averages = [part / divisor for part, divisor in zip(parts.tolist(), divisors, strict=True)]
    values = dict(zip(_PARTS, averages, strict=True))
    loss = values["nll"] + scale.weight * values["odds_ratio_loss"]
    return {"loss": loss, **named_metrics(averages, scale)}


def empty_parts(device: torch.device) -> Tensor:
    """Zeros [6] to add parts to."""
    # A sum over a large evaluation set needs the digits; MPS has no fp64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(len(_PARTS), dtype=dtype, device=device)
