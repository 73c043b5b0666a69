"""What `compare` shows, where names are long and the terminal is not wide."""

import io

import numpy
import pytest
from rich.console import Console

from lite_orpo.comparison.outcome import Result
from lite_orpo.comparison.runs import Cost
from lite_orpo.evaluation.figures import evaluate_scores
from lite_orpo.evaluation.scores import Scores
from lite_orpo.report.compare_picture import _name
from lite_orpo.report.compare_table import minutes, print_comparison

LONG = [f"dpo (beta {b}, learning_rate 5e-05, lora_r {r})" for b in (0.1, 0.2) for r in (8, 9)]
PROBLEM = "out of memory (CUDA out of memory); `lite-orpo plan` shows what takes it"


def results(labels):
    lengths = numpy.arange(5, 25)
    drawn = numpy.random.default_rng(0).random(20)
    scores = Scores(-lengths - drawn, -lengths - 1.0, lengths, lengths[::-1].copy())
    evaluation = evaluate_scores(scores, resamples=50)
    cost = Cost(12345.6, 61234.5, 123456.7)
    runs = [Result(label, evaluation, scores, cost) for label in labels]
    failed = Result("simpo (beta 2.5)", None, None, None, PROBLEM)
    return [Result("base model", evaluation, scores, None), *runs, failed]


def printed(labels, width):
    stream = io.StringIO()
    print_comparison(Console(file=stream, width=width), results(labels), 20)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_each_run_and_each_problem_can_be_read_whole(width):
    text = printed(LONG, width)
    words = " ".join(text.split())
    assert all(len(line) <= width for line in text.splitlines())
    assert PROBLEM in words
    if width == 80:
        assert all(f"{number} {label}" in words for number, label in enumerate(LONG, 1))
        # A line of a run is not stretched by its name.
        assert len(text.splitlines()) < 35


def test_short_names_stand_in_the_table():
    assert "1 orpo" not in printed(["orpo", "dpo"], 120)


def test_no_two_runs_have_the_same_name_in_the_picture():
    names = {_name(label) for label in LONG}
    assert len(names) == len(LONG)
    assert all(len(line) <= 28 for name in names for line in name.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.74, "0.7 s"), (9.97, "10 s"), (59.4, "59 s"), (185.0, "3:05"), (3723.0, "1:02:03")],
)
def test_a_duration_has_the_digits_that_tell_runs_apart(seconds, text):
    assert minutes(seconds) == text
