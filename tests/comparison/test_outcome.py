"""What a comparison says in words: never more than the pairs can tell."""

import numpy
import pytest

from lite_orpo.comparison.outcome import Result, read_comparison
from lite_orpo.evaluation.figures import evaluate_scores
from lite_orpo.evaluation.scores import Scores


def result(label, margins, level=-1.0):
    """A run whose mean log-probabilities lie around a level, apart by the given margins."""
    margins = numpy.asarray(margins, dtype=float)
    tokens = numpy.full(len(margins), 10)
    middle = level + 0.01 * numpy.arange(len(margins))
    scores = Scores(10 * (middle + margins / 2), 10 * (middle - margins / 2), tokens, tokens)
    return Result(label, evaluate_scores(scores, resamples=200), scores, None)


def mixed(right, wrong, size=0.3):
    return [size] * right + [-size] * wrong


def test_a_clear_winner_is_named_with_its_interval():
    text = " ".join(
        read_comparison(
            [result("base", mixed(50, 50)), result("a", mixed(95, 5)), result("b", mixed(60, 40))]
        )
    )
    assert text.startswith("a prefers the chosen answer most often: in 95% of 100 pairs, 35 points")
    assert "more than b" in text


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_equal_accuracies_are_not_told_apart_and_the_further_one_is_named(order):
    runs = {"a": result("a", [1.0] * 60), "b": result("b", [0.1] * 60)}
    text = " ".join(read_comparison([result("base", [0.0] * 60), *(runs[name] for name in order)]))
    assert "not to be told apart on 60 pairs" in text
    assert "a separates them further" in text


def test_two_runs_alike_are_said_to_be():
    scores = mixed(50, 10)
    text = " ".join(
        read_comparison([result("base", scores), result("a", scores), result("b", scores)])
    )
    assert "nor by log odds" in text
    assert "less likely" not in text


def test_a_run_that_writes_worse_than_the_base_model_is_named():
    text = " ".join(
        read_comparison(
            [
                result("base", [0.0] * 60),
                result("a", [1.0] * 60, level=-0.8),
                result("b", [1.0] * 60, level=-3.0),
            ]
        )
    )
    assert "less likely than the base model finds them" in text
    assert "b (" in text
    assert "a (" not in text


def test_one_run_with_a_result_is_compared_with_nothing():
    failed = Result("b", None, None, None, "no result")
    assert read_comparison([result("base", [0.0]), result("a", [1.0]), failed]) == []
