"""Training under a gradient scaler, as fp16 has one: its skips, a bad row, saving and going on.

Accelerate makes a scaler on GPUs only. torch has one for CPUs, and it is put where accelerate's
would be: backward, clipping and the optimiser's step then go through it as they do there, under
fp16 autocast.
"""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from test_step_guard import POISON, poisoned_model, rows_with_poison, trained, trainer
from tiny_models import TOKENIZER, plain_rows, tiny_model, with_lora
from transformers import TrainerCallback

from lite_orpo.checkpoint.tensor_tree import load_tree
from lite_orpo.errors import NonFiniteError

TOO_LARGE = 2.0**120  # products of fp16's gradients overflow; some halvings later they do not


@pytest.fixture(autouse=True)
def _precision_is_not_left_behind():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Watch(TrainerCallback):
    """Keeps the scale and a copy of the weights after every step."""

    def __init__(self):
        self.scales, self.weights = [], []

    def attach(self, run):
        self.run = run
        run.add_callback(self)
        return self

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.run.accelerator.scaler.get_scale())
        self.weights.append(trained(self.run.model))


def scaled(run, init_scale, *, backoff=0.5, growth_interval=2000):
    accelerator = run.accelerator
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=init_scale, backoff_factor=backoff, growth_interval=growth_interval
    )
    return run, Watch().attach(run)


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


def refused(run):
    return [log["lite_orpo/refused_steps"] for log in run.state.log_history if "loss" in log]


def test_the_scalers_own_skips_are_not_refused_steps_and_training_goes_on_finite(tmp_path):
    model = with_lora(tiny_model())
    run, watch = scaled(trainer(tmp_path, plain_rows(8), model), TOO_LARGE, backoff=2.0**-60)
    before = trained(run.model)
    run.train()
    assert hasattr(run.model, "_original_forward")  # that is, accelerate's autocast is around it
    assert watch.scales[0] < TOO_LARGE  # it skipped
    assert same(watch.weights[0], before)
    assert watch.scales[-1] == watch.scales[-2] > 0  # and found its scale
    assert not same(watch.weights[-1], before)
    assert refused(run) == [0] * 4
    assert all(value.isfinite().all() for value in watch.weights[-1].values())
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_run_under_a_scaler_takes_the_steps_of_one_without(tmp_path):
    runs = []
    for init_scale in (1.0, 2.0**16):
        model = with_lora(tiny_model())
        run, _ = scaled(trainer(tmp_path, plain_rows(8), model), init_scale)
        run.train()
        runs.append([(log["loss"], log["grad_norm"]) for log in run.state.log_history[:4]])
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("is_bad", ["loss and gradient", "loss alone"])
def test_a_row_without_a_finite_loss_is_refused_and_moves_no_weight(
    is_bad, tmp_path, caplog, monkeypatch
):
    """Where the gradient is finite the scaler would take the step."""
    rows = rows_with_poison(5)
    model = poisoned_model() if is_bad == "loss and gradient" else with_lora(tiny_model())
    run, watch = scaled(trainer(tmp_path, rows, model), 2.0**10)
    if is_bad == "loss alone":
        own, token = run._score, TOKENIZER.convert_tokens_to_ids(POISON)

        def score(model, row, *arguments, **options):
            loss, parts = own(model, row, *arguments, **options)
            return (loss + math.inf if (row.targets == token).any() else loss), parts

        monkeypatch.setattr(run, "_score", score)
    before = trained(run.model)
    run.train()
    assert "(train_dataset, rows 5, counted from 0)" in caplog.text
    assert sum(refused(run)) == 1
    weights = [before, *watch.weights]
    moved = [not same(new, old) for old, new in zip(weights, weights[1:], strict=False)]
    assert moved == [not count for count in refused(run)]
    assert all(value.isfinite().all() for value in watch.weights[-1].values())


def test_a_gradient_that_no_scale_makes_finite_is_refused_and_ends_the_run(tmp_path):
    model = with_lora(tiny_model())
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * torch.inf)
    run, watch = scaled(
        trainer(tmp_path, plain_rows(8), model, num_train_epochs=4, max_refused_steps=3), 8.0
    )
    before = trained(run.model)
    with pytest.raises(NonFiniteError, match="that makes 3 steps in a row"):
        run.train()
    assert watch.scales == [4.0, 2.0, 1.0, 0.5, 0.25]  # three skips of its own, then ours
    assert same(watch.weights[-1], before)


def test_going_on_restores_the_scale_and_ends_bit_for_bit_where_an_unbroken_run_does(tmp_path):
    def run_of(folder):
        model = with_lora(tiny_model(), lora_dropout=0.2)
        run = trainer(folder, plain_rows(8), model, num_train_epochs=2, save_strategy="steps",
                      save_steps=3)  # fmt: skip
        # Twelve steps' worth of growing and overflowing.
        return scaled(run, 1.5 * 2.0**118, backoff=2.0**-61, growth_interval=2)

    unbroken, all_of_it = run_of(tmp_path / "unbroken")
    unbroken.train()
    assert len(set(all_of_it.scales)) > 2
    saved = load_tree(tmp_path / "unbroken" / "checkpoint-3" / "scaler")
    assert saved["scale"] == all_of_it.scales[2]
    resumed, rest = run_of(tmp_path / "unbroken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert rest.scales == all_of_it.scales[3:]
    assert same(rest.weights[-1], all_of_it.weights[-1])
    ours, theirs = (run.accelerator.scaler.state_dict() for run in (resumed, unbroken))
    assert ours == theirs
