"""Accuracy with the length of the answers taken out.

Length-controlled accuracy: the accuracy there would be if the chosen answer were the longer one as
often as the shorter one. With L pairs whose chosen answer is longer, S whose rejected one is, and E
of equal length, N in all:

    (1 - E/N) * (accuracy over L + accuracy over S) / 2  +  E/N * accuracy over E

(direct standardisation). Whoever goes by length alone, longer or shorter, scores exactly 0.5.
The idea, a preference at a length difference that favours neither side, is that of AlpacaEval 2's
length-controlled win rate (arXiv 2404.04475). That one fits a logistic regression over many models
and instructions; with one model and labelled pairs the weights need no fit, and no shape has to be
assumed. Limit: pairs are told apart by which side is longer, not by how much.
"""

import numpy
from numpy.typing import NDArray

from .intervals import Array, Estimate, paired_difference, share, weighted_sum
from .scores import Scores


def length_controlled(outcomes: Array, scores: Scores, other: Array | None = None) -> Estimate:
    """Length-controlled mean of outcomes, or of `outcomes` minus `other`.

    Args:
        outcomes: [N], from `scores.preference`.
        scores: for the lengths.
        other: [N] outcomes of another model on the same pairs.

    Raises:
        ValueError: the chosen answer is nowhere longer, or nowhere shorter (`can_be_controlled`).
    """
    if not can_be_controlled(scores):
        raise ValueError("length_controlled() needs pairs of both kinds")
    longer, shorter, equal = _kinds(scores)
    of_equal = float(equal.mean())
    parts = [((1 - of_equal) / 2, longer), ((1 - of_equal) / 2, shorter), (of_equal, equal)]

    def of(which: NDArray[numpy.bool_]) -> Estimate:
        if other is None:
            return share(outcomes[which])
        return paired_difference(outcomes[which], other[which])

    return weighted_sum((weight, of(which)) for weight, which in parts if which.any())


def can_be_controlled(scores: Scores) -> bool:
    """Whether there are pairs of both kinds: chosen answer longer, and rejected answer longer."""
    longer, shorter, _ = _kinds(scores)
    return bool(longer.any() and shorter.any())


class LengthRule:
    """What one would score by taking the longer answer, or the shorter one: the better of both.

    Args:
        scores: for the lengths.
    """

    def __init__(self, scores: Scores) -> None:
        longer, shorter, equal = _kinds(scores)
        outcomes = longer + 0.5 * equal
        self.takes_longer = bool(outcomes.mean() >= 0.5)
        """Whether "take the longer one" is the better rule; otherwise "take the shorter one"."""
        self.outcomes: Array = outcomes if self.takes_longer else 1 - outcomes
        """[N], 1 where the rule is right."""
        self.accuracy = share(self.outcomes)
        self.chosen_longer = int(longer.sum())
        self.rejected_longer = int(shorter.sum())


def _kinds(
    scores: Scores,
) -> tuple[NDArray[numpy.bool_], NDArray[numpy.bool_], NDArray[numpy.bool_]]:
    difference = scores.chosen_tokens - scores.rejected_tokens
    return difference > 0, difference < 0, difference == 0
