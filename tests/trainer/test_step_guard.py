"""A row whose loss or gradient is not finite moves no weight; the run goes on and names it."""

import math

import pytest
import torch
from tiny_models import TOKENIZER, plain_rows, tiny_model, trainer_for, with_lora

from lite_orpo.errors import NonFiniteError

POISON = "Z"


def poisoned_model():
    """A model to which one letter is infinite."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids(POISON)] = torch.inf
    return with_lora(model)


def rows_with_poison(*at, count=8):
    rows = plain_rows(count)
    for number in at:
        rows[number]["chosen"] += POISON
    return rows


def trainer(folder, rows, model=None, **settings):
    return trainer_for(
        model or poisoned_model(), folder, rows,
        **{
            "prefix_sharing": "off", "per_device_train_batch_size": 1, "learning_rate": 0.01,
            "gradient_accumulation_steps": 2, "num_train_epochs": 1, **settings,
        },
    )  # fmt: skip


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"optim": "sgd"}])
def test_a_row_without_a_finite_loss_is_named_and_moves_no_weight(settings, tmp_path, caplog):
    run = trainer(tmp_path, rows_with_poison(5), **settings)
    before = trained(run.model)
    run.train()
    after = trained(run.model)
    assert run.state.global_step == 4
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert "(train_dataset, rows 5, counted from 0)" in caplog.text
    logs = [log for log in run.state.log_history if "loss" in log]
    assert sum(log["lite_orpo/refused_steps"] for log in logs) == 1
    refused = [log["lite_orpo/refused_steps"] for log in logs]
    assert [math.isnan(log["loss"]) for log in logs] == [bool(count) for count in refused]


def test_the_weights_stay_bit_for_bit_where_a_step_is_refused(tmp_path):
    run = trainer(tmp_path, rows_with_poison(0, count=2))
    before = trained(run.model)
    run.train()
    after = trained(run.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_log_of_good_and_refused_steps_has_the_loss_of_the_good_ones(tmp_path):
    run = trainer(tmp_path, rows_with_poison(5), logging_steps=4)
    run.train()
    (log,) = [log for log in run.state.log_history if "loss" in log]
    assert log["lite_orpo/refused_steps"] == 1
    assert 0 < log["loss"] < 20


def test_so_many_in_a_row_end_the_run_with_the_weights_as_they_were(tmp_path):
    run = trainer(tmp_path, rows_with_poison(*range(8)), max_refused_steps=3)
    before = trained(run.model)
    with pytest.raises(NonFiniteError, match="that makes 3 steps in a row") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    after = trained(run.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_good_steps_between_begin_the_count_anew(tmp_path):
    rows = rows_with_poison(0, 4, count=8)
    run = trainer(
        tmp_path, rows, max_refused_steps=2, gradient_accumulation_steps=1, seed=3,
        dataloader_num_workers=0,
    )  # fmt: skip
    run.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        run.train_dataset, batch_size=1, shuffle=False, collate_fn=run.data_collator
    )
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["lite_orpo/refused_steps"] for log in logs] == [1, 0, 0, 0, 1, 0, 0, 0]


def test_a_gradient_that_is_not_finite_counts_where_the_loss_is(tmp_path, caplog):
    model = with_lora(tiny_model())
    first = next(p for p in model.parameters() if p.requires_grad)
    left = [1]

    def spoil(gradient):
        return gradient * torch.inf if left and not left.clear() else gradient

    first.register_hook(spoil)
    run = trainer(tmp_path, plain_rows(6), model)
    run.train()
    assert all(value.isfinite().all() for value in trained(run.model).values())
    assert "is not taken (train_dataset, one of rows " in caplog.text
    logs = [log for log in run.state.log_history if "loss" in log]
    assert sum(log["lite_orpo/refused_steps"] for log in logs) == 1
