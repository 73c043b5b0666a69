"""What a run minimises: one of the losses with its settings, over the rows of a step.

The trainer hands in a row's token log-probabilities and the normalisers of the whole step; it
does not know the formulas. Every objective is

    nll_weight * NLL + preference_weight * (a preference term, a mean over pairs),

and `config/loss_types.py` says which terms a loss has and on what.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.loss_types import DEFAULT_CPO_ALPHA, DEFAULT_SIMPO_GAMMA, LOSS_TYPES, LossType
from ..errors import ConfigError
from . import orpo_loss
from .completions import CompletionLogps, completion_logps
from .pairwise import cpo_loss, dpo_loss, ipo_loss, sft_loss, simpo_loss


class RowLoss(NamedTuple):
    """One row's share of the loss and what it was made of; per-pair entries are detached."""

    loss: Tensor
    """Scalar."""
    nll: Tensor
    """Scalar, over the step's NLL tokens; without gradient where the loss has no NLL term."""
    preference: Tensor
    """Scalar, the unweighted preference term, over the step's pairs."""
    chosen_logps: Tensor
    """[P] by mean or by sum, as the loss has it."""
    rejected_logps: Tensor
    chosen_scores: Tensor
    """[P] what the loss compares: log-probabilities, or their ratios to the reference's."""
    rejected_scores: Tensor
    log_odds: Tensor
    """[P] log odds of chosen minus log odds of rejected, of mean log-probabilities (ORPO)."""


class Objective(NamedTuple):
    """A loss with its settings."""

    loss_type: str = "orpo"
    beta: float = 0.1
    """Strength of ORPO's odds-ratio term; in the other losses the factor inside."""
    temperature: float = 1.0
    """ORPO: factor on the log odds ratio."""
    simpo_gamma: float = DEFAULT_SIMPO_GAMMA
    cpo_alpha: float = DEFAULT_CPO_ALPHA
    """CPO: weight of the NLL."""

    @staticmethod
    def of(args: Any) -> "Objective":
        """From training arguments."""
        return Objective(
            args.loss_type,
            args.preference_beta,
            args.odds_ratio_temperature,
            DEFAULT_SIMPO_GAMMA if args.simpo_gamma is None else args.simpo_gamma,
            DEFAULT_CPO_ALPHA if args.cpo_alpha is None else args.cpo_alpha,
        )

    @property
    def kind(self) -> LossType:
        """What is particular to this loss."""
        return LOSS_TYPES[self.loss_type]

    @property
    def nll_weight(self) -> float:
        """Factor of the NLL in the loss."""
        if not self.kind.uses_nll:
            return 0.0
        return self.cpo_alpha if self.loss_type == "cpo" else 1.0

    @property
    def preference_weight(self) -> float:
        """Factor of the preference term in the loss."""
        return {"orpo": self.beta, "sft": 0.0}.get(self.loss_type, 1.0)

    @property
    def reward_scale(self) -> float:
        """What a score is multiplied with to be a reward in TRL's sense."""
        if self.loss_type == "orpo":
            return self.beta * self.temperature
        return 1.0 if self.loss_type == "sft" else self.beta

    def settings(self) -> dict[str, Any]:
        """Those that this loss has, for a fingerprint and for people."""
        names = {
            "orpo": ("beta", "temperature"),
            "simpo": ("beta", "simpo_gamma"),
            "cpo": ("beta", "cpo_alpha"),
            "sft": (),
        }.get(self.loss_type, ("beta",))
        return {"loss_type": self.loss_type, **{name: getattr(self, name) for name in names}}

    def in_words(self) -> str:
        """For the start of a run: `simpo (beta 2, simpo_gamma 1)`."""
        figures = [f"{name} {value:g}" for name, value in list(self.settings().items())[1:]]
        return self.loss_type + (f" ({', '.join(figures)})" if figures else "")

    def of_row(
        self,
        logps: Tensor,
        row: Any,
        *,
        pair_normalizer: float,
        nll_normalizer: float,
        backend: str,
    ) -> RowLoss:
        """The loss of one row batch.

        Args:
            logps: [M] token log-probabilities of the row's scored positions.
            row: a `RowBatch`, on their device; with reference log-probabilities where the loss
                compares with them.
            pair_normalizer: pairs of the whole step.
            nll_normalizer: NLL tokens of the whole step.
            backend: of `orpo_loss`.
        """
        compute = self._orpo if self.loss_type == "orpo" else self._pairwise
        return compute(logps, row, pair_normalizer, nll_normalizer, backend)

    def _orpo(
        self, logps: Tensor, row: Any, pairs: float, nll_tokens: float, backend: str
    ) -> RowLoss:
        loss = orpo_loss(
            logps,
            row.completion_ids,
            row.nll_mask,
            pair_count=row.pair_count,
            alpha=self.beta,
            temperature=self.temperature,
            pair_normalizer=pairs,
            nll_normalizer=nll_tokens,
            backend=backend,
        )
        chosen, rejected = loss.chosen_logps.detach(), loss.rejected_logps.detach()
        return RowLoss(
            loss.loss,
            loss.nll,
            loss.odds_ratio_loss,
            chosen,
            rejected,
            chosen,
            rejected,
            loss.log_odds.detach(),
        )

    def _pairwise(
        self, logps: Tensor, row: Any, pairs: float, nll_tokens: float, backend: str
    ) -> RowLoss:
        sums = completion_logps(logps, row.completion_ids, row.pair_count)
        nll = sft_loss(logps.float(), row.nll_mask) / nll_tokens
        terms = self._terms(sums, row.reference)
        # A pair of which nothing is scored here has no part in the loss.
        preference = torch.where(sums.is_whole, terms, torch.zeros_like(terms)).sum() / pairs
        with torch.no_grad():  # for the log alone
            odds = orpo_loss(
                logps.detach(), row.completion_ids, row.nll_mask,
                pair_count=row.pair_count, backend=backend,
            )  # fmt: skip
            chosen, rejected = self._compared(sums)
            reference_chosen, reference_rejected = self._compared_reference(sums, row.reference)
        return RowLoss(
            self._weighted(nll, preference),
            nll.detach(),
            preference.detach(),
            chosen,
            rejected,
            chosen - reference_chosen,
            rejected - reference_rejected,
            odds.log_odds,
        )

    def _weighted(self, nll: Tensor, preference: Tensor) -> Tensor:
        # Not 0 * term: a term that is no part of the loss must not be able to spoil it.
        parts = []
        if self.kind.uses_nll:
            parts.append(self.nll_weight * nll)
        if self.preference_weight:
            parts.append(self.preference_weight * preference)
        return torch.stack(parts).sum()

    def _compared(self, sums: CompletionLogps) -> tuple[Tensor, Tensor]:
        if self.kind.is_of_means:
            return sums.mean_chosen, sums.mean_rejected
        return sums.chosen, sums.rejected

    def _compared_reference(
        self, sums: CompletionLogps, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.kind.uses_reference:
            nothing = torch.zeros_like(sums.chosen)
            return nothing, nothing
        if reference is None:
            raise ConfigError(
                f"loss_type {self.loss_type} compares with a reference model, whose "
                "log-probabilities this set of pairs does not have; evaluate sets that the trainer "
                "was given before it trained"
            )
        own = reference.to(sums.chosen.dtype)
        return self._compared(sums._replace(chosen=own[:, 0], rejected=own[:, 1]))

    def _terms(self, sums: CompletionLogps, reference: Tensor | None) -> Tensor:
        chosen, rejected = self._compared(sums)
        if self.loss_type == "sft":
            return torch.zeros_like(chosen)
        if self.loss_type == "simpo":
            return simpo_loss(chosen, rejected, beta=self.beta, gamma=self.simpo_gamma)
        if self.loss_type == "cpo":
            return cpo_loss(chosen, rejected, beta=self.beta)
        compared = self._compared_reference(sums, reference)
        formula = dpo_loss if self.loss_type == "dpo" else ipo_loss
        return formula(chosen, rejected, *compared, beta=self.beta)
