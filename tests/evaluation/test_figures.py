"""Figures of pairs: right values, and length out of the length-controlled ones."""

import json
import math

import numpy
import pytest
import torch

from lite_orpo.evaluation.figures import LABELS, evaluate_scores
from lite_orpo.evaluation.reading import read_figures
from lite_orpo.evaluation.scores import Scores, preference
from lite_orpo_kernels import orpo_loss


def scores(margins, chosen_tokens, rejected_tokens):
    """Scores whose mean log-probabilities differ by `margins`."""
    chosen_tokens, rejected_tokens = (
        numpy.asarray(tokens, numpy.int64) for tokens in (chosen_tokens, rejected_tokens)
    )
    mean = numpy.full(len(margins), -3.0)
    return Scores(
        (mean + numpy.asarray(margins)) * chosen_tokens,
        mean * rejected_tokens,
        chosen_tokens,
        rejected_tokens,
    )


def lengths(count, longer_share, seed=0):
    random = numpy.random.default_rng(seed)
    short = random.integers(5, 20, count)
    long = short + random.integers(1, 30, count)
    is_longer = random.random(count) < longer_share
    return numpy.where(is_longer, long, short), numpy.where(is_longer, short, long)


@pytest.mark.parametrize("longer_share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1], ids=["longer", "shorter"])
def test_a_pure_length_rule_scores_one_half_when_length_is_controlled(longer_share, sign):
    chosen, rejected = lengths(400, longer_share)
    rule = scores(sign * 0.01 * (chosen - rejected), chosen, rejected)
    figures = evaluate_scores(rule).overall.figures
    assert figures["accuracy_length_controlled"].after.value == pytest.approx(0.5, abs=1e-12)
    if longer_share != 0.5:
        assert abs(figures["accuracy"].after.value - 0.5) > 0.1


def test_ties_in_length_leave_a_length_rule_at_one_half():
    chosen, rejected = lengths(100, 0.8)
    chosen[:30] = rejected[:30] = 10
    rule = scores(0.1 * (chosen - rejected), chosen, rejected)
    figures = evaluate_scores(rule).overall.figures
    assert figures["accuracy_length_controlled"].after.value == pytest.approx(0.5, abs=1e-12)


def test_a_preference_that_ignores_length_keeps_its_accuracy():
    chosen, rejected = lengths(20_000, 0.85)
    margins = numpy.where(numpy.random.default_rng(1).random(20_000) < 0.7, 0.1, -0.1)
    figures = evaluate_scores(scores(margins, chosen, rejected), resamples=50).overall.figures
    assert figures["accuracy_length_controlled"].after.value == pytest.approx(0.7, abs=0.01)


def test_length_is_not_controlled_where_it_cannot_be():
    only_longer = scores([0.1, 0.2, -0.1], [9, 9, 9], [5, 5, 5])
    evaluation = evaluate_scores(only_longer)
    assert "accuracy_length_controlled" not in evaluation.overall.figures
    assert "cannot be told from quality" in read_figures(evaluation.overall)[1]


def test_means_are_the_plain_ones():
    random = numpy.random.default_rng(3)
    chosen, rejected = lengths(50, 0.6)
    after = scores(random.normal(size=50), chosen, rejected)
    before = scores(random.normal(size=50), chosen, rejected)
    figures = evaluate_scores(after, before, reward_scale=0.2).overall.figures
    margin = after.mean_chosen - after.mean_rejected
    assert figures["margin"].after.value == pytest.approx(margin.mean())
    assert figures["reward_margin"].after.value == pytest.approx(0.2 * margin.mean())
    assert figures["nll_chosen"].after.value == pytest.approx(-after.chosen.sum() / chosen.sum())
    assert figures["nll_rejected"].before.value == pytest.approx(3.0)
    ratio = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    assert figures["implicit_margin"].after.value == pytest.approx(ratio.mean())
    assert figures["implicit_accuracy"].after.value == pytest.approx((ratio > 0).mean())
    for figure in figures.values():
        assert figure.after.low <= figure.after.value <= figure.after.high
        if figure.difference is not None:
            assert figure.difference.value == pytest.approx(
                figure.after.value - figure.before.value
            )
            assert figure.difference.low <= figure.difference.value <= figure.difference.high
    assert set(figures) == set(LABELS)


def test_log_odds_are_those_of_the_loss_and_finite_for_memorised_text():
    logps = torch.tensor([-0.5, -0.1, -2.0, -1e-9, -3.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 2, 3])
    expected = orpo_loss(logps, ids, torch.ones(5, dtype=torch.bool), pair_count=2).log_odds
    found = Scores(
        numpy.array([-0.6, -1e-9]),
        numpy.array([-2.0, -3.0]),
        numpy.array([2, 1]),
        numpy.array([1, 1]),
    )
    assert found.log_odds.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    certain = found._replace(chosen=numpy.zeros(2))
    assert numpy.isfinite(certain.log_odds).all()


def test_the_same_model_twice_differs_by_nothing():
    chosen, rejected = lengths(30, 0.5)
    same = scores(numpy.linspace(-1, 1, 30), chosen, rejected)
    figures = evaluate_scores(same, same).overall.figures
    for key in ("accuracy", "margin", "nll_chosen"):
        assert figures[key].difference.value == 0
        assert not figures[key].difference.excludes_zero
    assert figures["implicit_accuracy"].after.value == 0.5  # a tie is half right
    assert preference(numpy.array([-1.0, 0.0, 2.0])).tolist() == [0, 0.5, 1]


def test_groups_are_figures_of_their_pairs_alone_largest_first():
    chosen, rejected = lengths(40, 0.5)
    names = ["a"] * 10 + ["b"] * 30
    margins = [1.0] * 10 + [-1.0] * 30
    evaluation = evaluate_scores(scores(margins, chosen, rejected), groups=names)
    assert [(group.name, group.pairs) for group in evaluation.groups] == [("b", 30), ("a", 10)]
    assert evaluation.groups[1].figures["accuracy"].after.value == 1.0
    assert evaluation.overall.figures["accuracy"].after.value == 0.25


def test_one_pair_has_no_interval_of_a_mean_but_one_of_a_share():
    figures = evaluate_scores(scores([0.5], [4], [5])).overall.figures
    assert figures["margin"].after.low is None
    assert figures["accuracy"].after.low == pytest.approx(0.2065, abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_score_that_is_not_finite_is_refused(value):
    broken = scores([0.1, 0.2], [3, 3], [4, 4])
    broken.chosen[1] = value
    with pytest.raises(ValueError, match="1 pairs have a log-probability that is not finite"):
        Scores.of(broken)


def test_scores_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="not of the same pairs"):
        evaluate_scores(scores([0.1], [3], [4]), scores([0.1], [3], [5]))


def test_the_reading_tells_length_from_preference():
    chosen, rejected = lengths(300, 0.9)
    by_length = evaluate_scores(scores(0.1 * (chosen - rejected), chosen, rejected)).overall
    assert "may be no more than length" in read_figures(by_length)[1]
    by_content = evaluate_scores(scores([0.1] * 300, chosen, rejected)).overall
    assert "not length alone" in read_figures(by_content)[1]
    assert "100 %" in read_figures(by_content)[0].replace("100%", "100 %")
    json.dumps(read_figures(by_content))
