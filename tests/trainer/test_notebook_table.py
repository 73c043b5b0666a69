"""In a notebook, the table under a training shows what is read; elsewhere nothing changes."""

from transformers.utils.notebook import NotebookProgressCallback

from lite_orpo.notebook_table import short_figures, shorten_table


def test_the_figures_that_are_read_keep_their_prefix():
    metrics = {
        "eval_loss": 0.5,
        "eval_nll_loss": 0.4,
        "eval_rewards/margins": 0.1,
        "eval_helpful_rewards/accuracies": 0.9,
        "eval_runtime": 1.0,
    }
    shown = {"eval_loss": 0.5, "eval_margin": 0.1, "eval_helpful_accuracy": 0.9}
    assert short_figures(metrics) == shown
    assert short_figures({"loss": 1.0, "log_odds_chosen": 2.0}) == {"loss": 1.0, "log odds": 2.0}


def test_the_table_of_transformers_is_replaced_in_its_place():
    class Handler:
        callbacks = ["first", NotebookProgressCallback(), "last"]

    class Trainer:
        callback_handler = Handler

    shorten_table(Trainer)
    first, table, last = Handler.callbacks
    assert (first, last) == ("first", "last")
    assert isinstance(table, NotebookProgressCallback)
    assert type(table) is not NotebookProgressCallback
