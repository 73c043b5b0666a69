"""Figures of one model on a set of pairs, and beside those of another model on the same pairs.

`evaluate_scores` is the way in. A figure that cannot be had (length cannot be controlled where the
chosen answer is always the longer one) is left out of the result, never made up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy

from .intervals import Array, Estimate, paired_difference, percentiles, resampled_ratios, share
from .length import LengthRule, can_be_controlled, length_controlled
from .scores import Scores, preference

ACCURACY, CONTROLLED = "accuracy", "accuracy_length_controlled"
IMPLICIT, IMPLICIT_CONTROLLED = "implicit_accuracy", "implicit_accuracy_length_controlled"
MARGIN, REWARD_MARGIN, IMPLICIT_MARGIN = "margin", "reward_margin", "implicit_margin"
LOG_ODDS, NLL_CHOSEN, NLL_REJECTED = "log_odds", "nll_chosen", "nll_rejected"


class Label(NamedTuple):
    """What a figure is called, and what it is."""

    name: str
    meaning: str


LABELS = {
    ACCURACY: Label("reward accuracy", "chosen likelier, a token"),
    CONTROLLED: Label("... length-controlled", "length evened out"),
    IMPLICIT: Label("implicit accuracy", "log ratio to base (DPO)"),
    IMPLICIT_CONTROLLED: Label("... length-controlled", "length evened out"),
    MARGIN: Label("margin", "nats a token"),
    REWARD_MARGIN: Label("reward margin", "beta times the margin"),
    IMPLICIT_MARGIN: Label("implicit margin", "log ratio to base, nats"),
    LOG_ODDS: Label("log odds", "chosen over rejected"),
    NLL_CHOSEN: Label("NLL of chosen", "nats a token of the answer"),
    NLL_REJECTED: Label("NLL of rejected", "nats a token of the answer"),
}
"""Keys of all figures, in the order in which they are shown."""

SHARES = frozenset({ACCURACY, CONTROLLED, IMPLICIT, IMPLICIT_CONTROLLED})
"""Figures between 0 and 1, of which 0.5 is a guess."""


class Figure(NamedTuple):
    """One figure by two models on the same pairs."""

    after: Estimate
    before: Estimate | None = None
    """By the other model; None where there is none, or where the figure compares the two."""
    difference: Estimate | None = None
    """`after` minus `before`, paired."""


class GroupFigures(NamedTuple):
    """Figures of some pairs."""

    name: str | None
    """Value of the column; None: all pairs."""
    pairs: int
    figures: dict[str, Figure]
    length_rule: LengthRule


class Evaluation(NamedTuple):
    """Figures of a set of pairs, and of its groups, the largest first."""

    overall: GroupFigures
    groups: tuple[GroupFigures, ...]


def evaluate_scores(
    after: Scores,
    before: Scores | None = None,
    *,
    groups: Sequence[str] | None = None,
    reward_scale: float | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Evaluation:
    """Figures with 95 % intervals, over all pairs and by group.

    Accuracies are over pairs, with a tie as half; NLL is over tokens (a long answer counts by its
    length), without the prompt's. An implicit reward is log pi(y)/ref(y), summed over tokens, with
    `before` as the reference (arXiv 2305.18290), so there is none without it.

    Args:
        after: by the trained model.
        before: by the model to compare with, of the same pairs.
        groups: [N] names; None: no groups.
        reward_scale: the beta that TRL's rewards carry, where the loss compares mean
            log-probabilities (orpo, simpo); None: no reward margin.
        seed: of the resamples that intervals of means are taken from.
        resamples: how many.

    Raises:
        ValueError: the scores are not of the same pairs, or `groups` is of another length.
    """
    if before is not None and not (
        numpy.array_equal(after.chosen_tokens, before.chosen_tokens)
        and numpy.array_equal(after.rejected_tokens, before.rejected_tokens)
    ):
        raise ValueError("the scores are not of the same pairs: their lengths differ")
    if groups is not None and len(groups) != len(after.chosen):
        raise ValueError(f"{len(groups)} group names for {len(after.chosen)} pairs")

    def of(name: str | None, which: Array | None) -> GroupFigures:
        ours = after if which is None else after.of_pairs(which)
        base = before if which is None or before is None else before.of_pairs(which)
        figures = _figures(ours, base, reward_scale, seed, resamples)
        ordered = {key: figures[key] for key in LABELS if key in figures}
        return GroupFigures(name, len(ours.chosen), ordered, LengthRule(ours))

    names = numpy.asarray(groups if groups is not None else [], dtype=object)
    found = [of(name, names == name) for name in dict.fromkeys(names.tolist())]
    return Evaluation(of(None, None), tuple(sorted(found, key=lambda g: (-g.pairs, str(g.name)))))


def _figures(
    after: Scores, before: Scores | None, scale: float | None, seed: int, resamples: int
) -> dict[str, Figure]:
    ours = preference(after.mean_chosen - after.mean_rejected)
    theirs = None if before is None else preference(before.mean_chosen - before.mean_rejected)
    figures = {ACCURACY: _accuracy(ours, theirs)}
    is_controlled = can_be_controlled(after)
    if is_controlled:
        figures[CONTROLLED] = Figure(length_controlled(ours, after))
        if theirs is not None:
            figures[CONTROLLED] = Figure(
                length_controlled(ours, after),
                length_controlled(theirs, after),
                length_controlled(ours, after, theirs),
            )
    columns = _means(after, scale)
    count = len(columns)
    if before is not None:
        columns |= {f"before {key}": parts for key, parts in _means(before, scale).items()}
        ratio = (after.chosen - before.chosen) - (after.rejected - before.rejected)
        columns[IMPLICIT_MARGIN] = ratio, numpy.ones_like(ratio)
        figures[IMPLICIT] = Figure(share(preference(ratio)))
        if is_controlled:
            figures[IMPLICIT_CONTROLLED] = Figure(length_controlled(preference(ratio), after))
    return figures | _resampled(columns, count, seed, resamples)


def _accuracy(ours: Array, theirs: Array | None) -> Figure:
    if theirs is None:
        return Figure(share(ours))
    return Figure(share(ours), share(theirs), paired_difference(ours, theirs))


def _means(scores: Scores, scale: float | None) -> dict[str, tuple[Array, Array]]:
    """Numerator and denominator of each mean, pair by pair."""
    margin = scores.mean_chosen - scores.mean_rejected
    ones = numpy.ones_like(margin)
    reward = {} if scale is None else {REWARD_MARGIN: (scale * margin, ones)}
    return reward | {
        MARGIN: (margin, ones),
        LOG_ODDS: (scores.log_odds, ones),
        NLL_CHOSEN: (-scores.chosen, scores.chosen_tokens.astype(numpy.float64)),
        NLL_REJECTED: (-scores.rejected, scores.rejected_tokens.astype(numpy.float64)),
    }


def _resampled(
    columns: dict[str, tuple[Array, Array]], count: int, seed: int, resamples: int
) -> dict[str, Figure]:
    numerators, denominators = (
        numpy.stack([parts[i] for parts in columns.values()], axis=1) for i in (0, 1)
    )
    values = numerators.sum(0) / denominators.sum(0)
    pairs = len(numerators)
    draws = None
    if pairs > 1:  # one pair has no spread to resample
        draws = resampled_ratios(numerators, denominators, seed=seed, resamples=resamples)

    def estimate(first: int, second: int | None = None) -> Estimate:
        value = values[first] - (0.0 if second is None else values[second])
        if draws is None:
            return Estimate(float(value))
        drawn = draws[:, first] if second is None else draws[:, first] - draws[:, second]
        return percentiles(float(value), drawn)

    places = {key: place for place, key in enumerate(columns)}
    figures = {}
    for key in list(columns)[:count]:
        base = places.get(f"before {key}")
        figures[key] = (
            Figure(estimate(places[key]))
            if base is None
            else Figure(estimate(places[key]), estimate(base), estimate(places[key], base))
        )
    if IMPLICIT_MARGIN in places:
        figures[IMPLICIT_MARGIN] = Figure(estimate(places[IMPLICIT_MARGIN]))
    return figures
