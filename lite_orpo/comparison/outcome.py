"""What came out of a comparison: a line for the base model and for each run, and how to read it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..evaluation.figures import ACCURACY, LOG_ODDS, NLL_CHOSEN, Evaluation, evaluate_scores
from ..evaluation.intervals import Estimate
from ..evaluation.scores import Scores
from .runs import Cost


class Result(NamedTuple):
    """One line: the base model, or a run."""

    label: str
    evaluation: Evaluation | None
    """None: the run has no result."""
    scores: Scores | None
    cost: Cost | None
    """None: the base model, or a run without a result."""
    problem: str | None = None
    history: tuple[dict[str, Any], ...] = ()
    """Log lines of the run."""
    answers: tuple[str, ...] = ()
    """To the sampled prompts."""

    def estimate(self, key: str) -> Estimate | None:
        """One of the figures over all pairs."""
        if self.evaluation is None or key not in self.evaluation.overall.figures:
            return None
        return self.evaluation.overall.figures[key].after


def read_comparison(results: Sequence[Result]) -> list[str]:
    """A few sentences: which run is ahead, whether so many pairs can tell, and what it costs.

    Args:
        results: the base model first, then the runs.
    """
    runs = [result for result in results[1:] if result.scores is not None]
    if len(runs) < 2:
        return []
    return [_ranking(runs), *_unlearned(results[0], runs)]


def _ranking(runs: Sequence[Result]) -> str:
    ranked = sorted(runs, key=lambda run: (-_value(run, ACCURACY), -_value(run, LOG_ODDS)))
    best, second = ranked[:2]
    assert best.scores is not None and second.scores is not None
    figure = evaluate_scores(best.scores, second.scores, resamples=1000).overall.figures
    accuracy, odds = figure[ACCURACY].difference, figure[LOG_ODDS].difference
    assert accuracy is not None and odds is not None
    pairs = len(best.scores.chosen)
    if accuracy.excludes_zero:
        return (
            f"{best.label} prefers the chosen answer most often: in {_value(best, ACCURACY):.0%} "
            f"of {pairs:,} pairs, {100 * accuracy.value:.0f} points ({_range(accuracy, 100)}) more "
            f"than {second.label}."
        )
    sentence = (
        f"By accuracy {best.label} and {second.label} are not to be told apart on {pairs:,} pairs "
        f"(difference {100 * accuracy.value:+.0f} points, {_range(accuracy, 100)})"
    )
    if not odds.excludes_zero:
        return f"{sentence}, nor by log odds."
    ahead, by = best if odds.value > 0 else second, abs(odds.value)
    digits = 2 if by > 0.1 else 3
    return (
        f"{sentence}; {ahead.label} separates them further (log odds {by:.{digits}f} more), "
        "but losses aim at different margins."
    )


def _unlearned(base: Result, runs: Sequence[Result]) -> list[str]:
    """Runs that write the chosen answers worse than the base model: preference is not all."""
    worse = []
    for run in runs:
        assert run.scores is not None
        rise = evaluate_scores(run.scores, base.scores, resamples=1000).overall.figures[NLL_CHOSEN]
        if rise.difference is not None and rise.difference.low is not None:
            if rise.difference.low > 0:
                worse.append(f"{run.label} ({rise.after.value:.2f})")
    if not worse:
        return []
    before = _value(base, NLL_CHOSEN)
    return [
        f"The chosen answers have become less likely than the base model finds them (NLL "
        f"{before:.2f}): {', '.join(worse)}. Read the samples; a lower learning_rate, fewer steps "
        "or (dpo, ipo) a higher beta keep the language."
    ]


def _value(result: Result, key: str) -> float:
    estimate = result.estimate(key)
    return float("-inf") if estimate is None else estimate.value


def _range(estimate: Estimate, factor: float) -> str:
    if estimate.low is None or estimate.high is None:
        return "too few pairs for an interval"
    return f"{factor * estimate.low:+.0f} to {factor * estimate.high:+.0f}"
