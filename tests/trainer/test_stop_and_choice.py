"""A signal while a choice is made (early stopping, the best model) does not change the choice."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import plain_rows, tiny_model, trainer_for, with_lora
from transformers import EarlyStoppingCallback, TrainerCallback

from lite_orpo.interruption import StopWithCheckpoint


class Interrupt(TrainerCallback):
    """Sends this process a signal in the middle of a step, or of the evaluation after it."""

    def __init__(self, moment, step):
        self._left = [(moment, step)]

    def _at(self, *now):
        if now in self._left:
            self._left.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    def on_substep_end(self, args, state, control, **kwargs):
        self._at("step", state.global_step + 1)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._at("evaluation", state.global_step)


def run_of(folder, kind, *callbacks, patience=2, **settings):
    return trainer_for(
        with_lora(tiny_model(), lora_dropout=0.2), folder, plain_rows(8),
        eval_dataset=plain_rows(11)[8:],
        callbacks=[*([EarlyStoppingCallback(patience)] if patience else []), *callbacks],
        **{
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 1,
            "num_train_epochs": 5, "learning_rate": 0.02, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_rewards/margins", **KINDS[kind], **settings,
        },
    )  # fmt: skip


KINDS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    "best": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"},
    "epoch": {"eval_strategy": "epoch", "save_strategy": "epoch"},
}
# Four steps an epoch. The step of the best evaluation, and the one that early stopping ends at;
# of "steps", one in between is worse and does not end it.
ENDS = {"steps": (11, 13), "best": (4, 8), "epoch": (8, 16)}


def outcome(run):
    (early,) = [c for c in run.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    evaluations = [
        {key: value for key, value in log.items() if "runtime" not in key and "second" not in key}
        for log in run.state.log_history
        if "eval_loss" in log
    ]
    best = Path(run.state.best_model_checkpoint)
    return {
        "step": run.state.global_step,
        "best": (best.name, run.state.best_global_step, run.state.best_metric),
        "patience": early.early_stopping_patience_counter,
        "evaluations": evaluations,
        "weights": {n: p.detach() for n, p in run.model.named_parameters() if "lora" in n},
        "best weights": load_file(best / "adapter_model.safetensors"),
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "weights" in name:
            assert all(torch.equal(ours[name][key], value[key]) for key in value), name
        else:
            assert ours[name] == value, name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    outcomes = {}
    for kind, (best, last) in ENDS.items():
        run = run_of(tmp_path_factory.mktemp(kind), kind)
        run.train()
        assert (run.state.best_global_step, run.state.global_step) == (best, last)
        outcomes[kind] = outcome(run)
    return outcomes


@pytest.mark.parametrize(
    ("kind", "moment", "steps"),
    [
        ("steps", "evaluation", (8, 11)),
        ("steps", "step", (8,)),
        ("best", "evaluation", (4, 6)),
        ("best", "step", (5, 6)),
        ("epoch", "evaluation", (12,)),
        ("epoch", "step", (12, 13)),
    ],
)
def test_an_interrupted_run_chooses_as_an_unbroken_one(kind, moment, steps, unbroken, tmp_path):
    for step in steps:
        stop = StopWithCheckpoint()
        stopped = run_of(tmp_path / str(step), kind, Interrupt(moment, step), stop)
        stopped.train()
        assert stop.has_stopped
        # An evaluation that something depends on is not cut; the step after it is whole.
        assert stopped.state.global_step == step + (moment == "evaluation")
        assert stopped.args.load_best_model_at_end
        resumed = run_of(tmp_path / str(step), kind, StopWithCheckpoint())
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), unbroken[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_a_run_that_ends_with_the_step_of_the_signal_is_not_stopped(
    kind, moment, unbroken, tmp_path
):
    """Early stopping ends it at the evaluation of the step: what is chosen is the best model."""
    stop = StopWithCheckpoint()
    run = run_of(tmp_path, kind, Interrupt(moment, ENDS[kind][1]), stop)
    run.train()
    assert (stop.signal, stop.has_stopped) == (signal.SIGTERM, False)
    assert_same(outcome(run), unbroken[kind])


def test_a_signal_in_the_last_step_loads_the_best_model_all_the_same(tmp_path):
    outcomes = []
    for callbacks in ([], [Interrupt("step", 7), StopWithCheckpoint()]):
        folder = tmp_path / str(len(callbacks))
        run = run_of(folder, "steps", *callbacks, max_steps=7, learning_rate=0.05, patience=100)
        run.train()
        assert run.state.best_global_step < 7
        outcomes.append(outcome(run))
    assert_same(*outcomes)


def test_early_stopping_goes_on_counting_under_the_patience_that_is_set_now(tmp_path):
    """Best at 8, worse at 12: with a patience of 3, two more evaluations end it."""
    run_of(tmp_path, "epoch").train()
    more = run_of(tmp_path, "epoch", patience=3)
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert more.state.global_step == 20
    assert outcome(more)["patience"] == 3


def test_several_callbacks_of_one_kind_each_go_on_with_their_own_count(tmp_path):
    callbacks = [EarlyStoppingCallback(9, early_stopping_threshold=0.5), EarlyStoppingCallback(9)]
    first = run_of(tmp_path, "epoch", *callbacks, patience=None, num_train_epochs=3)
    first.train()
    counts = [c.early_stopping_patience_counter for c in callbacks]
    assert counts[0] > counts[1]
    again = [EarlyStoppingCallback(9, early_stopping_threshold=0.5), EarlyStoppingCallback(9)]
    more = run_of(tmp_path, "epoch", *again, patience=None, num_train_epochs=3)
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert [c.early_stopping_patience_counter for c in again] == counts
