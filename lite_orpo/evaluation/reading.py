"""What the figures say, in sentences for somebody who has never seen such figures."""

from .figures import ACCURACY, CONTROLLED, GroupFigures
from .intervals import Estimate

FEW_PAIRS = 30


def read_figures(group: GroupFigures, trained: str = "the adapter") -> list[str]:
    """Two or three sentences: what changed, whether length explains it, how far to trust it.

    Args:
        group: figures of all pairs.
        trained: what the trained model is called.
    """
    figure = group.figures[ACCURACY]
    sentences = []
    if figure.before is None or figure.difference is None:
        sentences.append(
            f"{trained.capitalize()} finds the chosen answer likelier than the rejected one in "
            f"{_share(figure.after)} of {group.pairs:,} pairs; a coin would in 50 %."
        )
    else:
        sentences.append(
            f"With {trained} the chosen answer is likelier than the rejected one in "
            f"{_share(figure.after)} of {group.pairs:,} pairs, before in "
            f"{figure.before.value:.0%}: {_change(figure.difference)}."
        )
    sentences.append(_about_length(group))
    if group.pairs < FEW_PAIRS:
        sentences.append(f"{group.pairs} pairs are few: the intervals are wide for a reason.")
    return sentences


def _about_length(group: GroupFigures) -> str:
    rule = group.length_rule
    accuracy = group.figures[ACCURACY].after
    which = "longer" if rule.takes_longer else "shorter"
    alone = f"Taking the {which} answer would be right in {rule.accuracy.value:.0%}"
    if CONTROLLED not in group.figures:
        kind = "longer" if rule.chosen_longer else "shorter"
        if not rule.chosen_longer and not rule.rejected_longer:
            return "All answers of a pair are equally long, so length has no part in it."
        return (
            f"{alone}, for no chosen answer is {'shorter' if kind == 'longer' else 'longer'} than "
            "the rejected one: on such pairs length cannot be told from quality."
        )
    controlled = group.figures[CONTROLLED].after
    text = f"{alone}; with length evened out the accuracy is {_share(controlled)}"
    assert controlled.low is not None and controlled.high is not None
    if controlled.low > 0.5:
        return f"{text}: it is not length alone."
    if controlled.high < 0.5:
        return f"{text}: worse than a coin."
    if accuracy.low is not None and accuracy.low > 0.5:
        return f"{text}, which may be a coin: what is preferred may be no more than length."
    return f"{text}: not to be told from a coin."


def _change(difference: Estimate) -> str:
    points = f"{100 * difference.value:+.0f} points ({_points(difference)})"
    if difference.excludes_zero:
        return points
    return f"{points}, no difference that so many pairs can show"


def _points(estimate: Estimate) -> str:
    assert estimate.low is not None and estimate.high is not None
    return f"{100 * estimate.low:+.0f} to {100 * estimate.high:+.0f}"


def _share(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.0%} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
