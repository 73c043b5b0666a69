"""Runs that other trainers lose to NaN end finite: memorised pairs, and rows that do not fit."""

import math

import pytest
import torch
from tiny_models import GradientRecorder, plain_rows, tiny_model, trainer_for, with_lora
from torch.nn import functional as F

from lite_orpo.step.context import step_context

# ---- pairs that are learnt by heart ----

PAIR = {"prompt": "Say it: ", "chosen": "blue ice", "rejected": "old oak"}
REVERSED = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
OTHER = {"prompt": "And then? ", "chosen": "a red cat", "rejected": "x"}


def model_of(kind):
    """Its head is sharp enough that a model of this size can be sure of something."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return with_lora(model) if kind == "LoRA" else model


def run(folder, rows, model, **settings):
    """Train on a few pairs again and again; returns the trainer and the gradients of each step."""
    recorder = GradientRecorder()
    trainer = trainer_for(
        model, folder, rows, callbacks=[recorder],
        **{
            "per_device_train_batch_size": 2, "nll_tokens": "completion", "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant", "learning_rate": 0.01,
            # A gradient that vanishes is made a whole step of.
            "adam_beta2": 0.9, "adam_epsilon": 1e-30, **settings,
        },
    )  # fmt: skip
    trainer.train()
    return trainer, recorder.steps


def means(trainer):
    """Mean log-probability [2] of the first pair's chosen and rejected completion."""
    row = trainer.planner.plan([trainer.train_dataset[0]])[0]
    with torch.no_grad(), step_context(trainer), trainer.compute_loss_context_manager():
        logps = trainer.model(**row.inputs, score_rows=(row.score_index, row.targets)).float()
    return torch.stack([logps[row.completion_ids == i].mean() for i in (0, 1)])


def usual_form_is_finite(chosen_and_rejected):
    """Whether the odds-ratio loss as it is usually written, and its gradient, have numbers."""
    logps = chosen_and_rejected.clone().requires_grad_()
    log_odds = logps - torch.log1p(-torch.exp(logps))
    loss = -F.logsigmoid(log_odds[0] - log_odds[1])
    (gradient,) = torch.autograd.grad(loss, logps)
    return bool(loss.isfinite() & gradient.isfinite().all())


def assert_all_finite(trainer, steps):
    assert all(gradient.isfinite().all() for step in steps for gradient in step.values())
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == trainer.state.global_step
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values()), log
    assert all(log["lite_orpo/refused_steps"] == 0 for log in logs)


@pytest.mark.parametrize(
    ("kind", "bf16", "pairs"),
    [("full", False, [PAIR, OTHER]), ("LoRA", False, [PAIR]), ("LoRA", True, [PAIR])],
    ids=["full-fp32-two pairs", "LoRA-fp32", "LoRA-bf16"],
)  # fmt: skip
def test_a_pair_that_is_learnt_by_heart_and_then_turned_round_stays_finite(
    kind, bf16, pairs, tmp_path
):
    model = model_of(kind)
    trainer, steps = run(tmp_path, pairs, model, max_steps=200, bf16=bf16)
    assert_all_finite(trainer, steps)
    found = means(trainer)
    assert -3e-8 < found[0] <= 0  # its exponential is 1 in fp32
    assert not usual_form_is_finite(found)
    # Now it is the rejected one that the model is sure of.
    turned = {"max_steps": 6, "learning_rate": 1e-3, "adam_epsilon": 1e-8, "bf16": bf16}
    trainer, steps = run(tmp_path, [REVERSED, *pairs[1:]], model, **turned)
    assert_all_finite(trainer, steps)
    assert not usual_form_is_finite(found.flip(0))
    assert means(trainer)[1] < found[0]
    assert any(gradient.any() for gradient in steps[0].values())


# ---- rows that do not fit ----

MANY = plain_rows(30)
LONG_PROMPT = {**plain_rows(8)[7], "prompt": "so it goes on, " * 20}
LONG_COMPLETION = {**plain_rows(9)[8], "chosen": "and on " * 40}


@pytest.mark.parametrize("packed", ["on", "off"])
@pytest.mark.parametrize(
    ("rule", "long_row", "kept", "told"),
    [
        ("drop", LONG_PROMPT, 30, "1 left out: column 'prompt' is too long"),
        ("cut_prompt", LONG_PROMPT, 31, "1 prompts cut at their beginning"),
        ("drop", LONG_COMPLETION, 30, "1 left out: column 'chosen' is too long"),
        ("cut_prompt", LONG_COMPLETION, 30, "1 left out: column 'chosen' is too long"),
    ],
    ids=["prompt-drop", "prompt-cut", "completion-drop", "completion-cut"],
)
def test_a_row_that_others_would_cut_to_nothing_is_told_and_costs_no_weight(
    rule, long_row, kept, told, packed, tmp_path
):
    """Cut to 64 tokens, its prompt or its answer would fill them: no token is left to score."""
    rows = [*MANY[:12], long_row, *MANY[12:]]
    trainer, steps = run(
        tmp_path, rows, with_lora(tiny_model()), max_length=64, overlong_rows=rule,
        num_train_epochs=1, per_device_train_batch_size=4, prefix_sharing=packed,
    )  # fmt: skip
    assert_all_finite(trainer, steps)
    assert len(steps) == 8
    (report,) = trainer.data_reports
    assert (report.kept, report.cut) == (kept, kept - 30)
    (line,) = report.lines()[1:]
    assert told in line and ("(row 12)" in line) == (kept == 30)
    for pair in trainer.train_dataset:
        assert pair["chosen_input_ids"][-1] == pair["rejected_input_ids"][-1]  # the EOS
        assert pair["length"] <= 64
