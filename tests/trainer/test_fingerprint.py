"""A run goes on only from a checkpoint of the same weights, data, adapter and settings."""

import json
import re

import pytest
import torch
from small_runs import StopAt
from tiny_models import plain_rows, tiny_model, trainer_for, with_lora

from lite_orpo.checkpoint import fingerprint
from lite_orpo.checkpoint.manifest import write_manifest
from lite_orpo.errors import CheckpointError

SETTINGS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}


def run(folder, model=None, rows=None, resume=None, **settings):
    trainer = trainer_for(
        with_lora(tiny_model()) if model is None else model,
        folder,
        plain_rows(8) if rows is None else rows,
        **{**SETTINGS, "max_steps": 2, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def folder(tmp_path):
    run(tmp_path)
    return tmp_path


def other_rows():
    rows = plain_rows(8)
    rows[6]["rejected"] = rows[6]["rejected"][:-1] + "!"
    return rows


CHANGES = {
    "base weights": {"model": lambda: with_lora(tiny_model(seed=5))},
    "data": {"rows": other_rows},
    "adapter": {"model": lambda: with_lora(tiny_model(), lora_alpha=3)},
    "loss settings": {"beta": 0.3},
    "pairs of a step": {"seed": 7},
}
ORDERS = {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_that_differs_is_named_and_refused_until_it_is_forced(part, folder, caplog):
    change = {k: v() if callable(v) else v for k, v in CHANGES[part].items()}
    with pytest.raises(
        CheckpointError, match=f"checkpoint-2 .* differs in: {part}(;| [(])"
    ) as caught:
        run(folder, resume=True, max_steps=4, **change)
    assert "resume_despite_changes: true" in str(caught.value)
    change = {k: v() if callable(v) else v for k, v in CHANGES[part].items()}
    run(folder, resume=True, max_steps=4, resume_despite_changes=True, **change)
    told = f"differs in: {part}[^;]*; resume_despite_changes is set"
    assert re.search(told, caplog.text.replace("\n", " "))


def test_the_template_is_a_part(folder):
    trainer = trainer_for(with_lora(tiny_model()), folder, plain_rows(8), **SETTINGS)
    trainer.processing_class.chat_template = "{{ messages }}"
    try:
        with pytest.raises(CheckpointError, match="differs in: chat template;"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        trainer.processing_class.chat_template = None


@pytest.mark.parametrize("name", ORDERS)
def test_another_order_of_the_pairs_would_show_some_twice_and_is_refused(name, folder):
    with pytest.raises(
        CheckpointError, match=r"differs in: pairs of a step \(\w+ .* there, .* here"
    ):
        run(folder, resume=True, max_steps=4, **{name: ORDERS[name]})


def test_how_long_may_change(folder):
    goes_on = run(folder, resume=True, max_steps=4, max_tokens_per_row=64)
    assert goes_on.state.global_step == 4


def test_how_fast_may_change_and_then_does(tmp_path, caplog):
    settings = {"lr_scheduler_type": "constant", "logging_steps": 1}
    run(tmp_path, learning_rate=1e-3, **settings)
    changed = {"learning_rate": 2.5e-4, "weight_decay": 0.5, "adam_beta2": 0.99}
    goes_on = run(tmp_path, resume=True, max_steps=4, **settings, **changed)
    decayed = [group for group in goes_on.optimizer.param_groups if group["weight_decay"]]
    assert decayed and all(group["weight_decay"] == 0.5 for group in decayed)
    assert all(group["betas"] == (0.9, 0.99) for group in goes_on.optimizer.param_groups)
    assert all(group["lr"] == 2.5e-4 for group in goes_on.optimizer.param_groups)
    rates = [line["learning_rate"] for line in goes_on.state.log_history if "loss" in line]
    assert rates == [1e-3, 1e-3, 2.5e-4, 2.5e-4]
    assert (
        "from here on: learning_rate 0.00025, not 0.001; weight_decay 0.5, not 0.0" in caplog.text
    )


def test_a_schedule_goes_on_where_it_is_from_another_rate(tmp_path):
    settings = {"lr_scheduler_type": "linear", "max_steps": 4, "logging_steps": 1}
    run(tmp_path, learning_rate=1e-3, callbacks=[StopAt(2)], **settings)
    goes_on = run(tmp_path, resume=True, learning_rate=5e-4, **settings)
    rates = [line["learning_rate"] for line in goes_on.state.log_history if "loss" in line]
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 1.25e-4])


def test_another_optimizer_has_no_use_for_the_state(folder):
    for is_forced in (False, True):
        with pytest.raises(CheckpointError, match="differs in: optimizer .optim adamw_torch.* sgd"):
            run(folder, resume=True, max_steps=4, optim="sgd", resume_despite_changes=is_forced)


def test_a_model_that_trains_in_full_is_known_by_the_weights_that_it_began_with(tmp_path):
    run(tmp_path, model=tiny_model())
    assert run(tmp_path, model=tiny_model(), resume=True, max_steps=4).state.global_step == 4
    with pytest.raises(CheckpointError, match="differs in: base weights;"):
        run(tmp_path, model=tiny_model(seed=3), resume=True, max_steps=6)


def test_a_notebook_that_was_stopped_goes_on_with_the_trainer_that_it_has(tmp_path):
    stop = StopAt(2)
    trainer = run(tmp_path, model=tiny_model(), max_steps=4, callbacks=[stop])
    assert trainer.state.global_step == 2
    stop.step = 4
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_an_embedding_on_the_host_is_still_a_base_weight(tmp_path):
    settings = {"offload_embedding": True}
    untied = {"tie_word_embeddings": False}
    run(tmp_path, model=with_lora(tiny_model(**untied)), **settings)
    run(tmp_path, model=with_lora(tiny_model(**untied)), resume=True, max_steps=4)
    other = tiny_model(**untied)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(CheckpointError, match="differs in: base weights;"):
        run(tmp_path, model=with_lora(other), resume=True, max_steps=6, **settings)


def test_other_versions_are_told_and_no_more(folder, monkeypatch, caplog):
    monkeypatch.setattr(fingerprint, "_versions", lambda: {"torch": "1.0"})
    run(folder, resume=True, max_steps=4)
    assert "checkpoint-2 was written with torch 2" in caplog.text
    assert "there, 1.0 here" in caplog.text


def test_a_checkpoint_without_a_fingerprint_is_refused(folder):
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "fingerprint.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"everything \(it has no fingerprint\)"):
        run(folder, resume=True, max_steps=4)


def test_it_says_nothing_of_where_things_are(folder):
    text = (folder / "checkpoint-2" / "fingerprint.json").read_text()
    assert str(folder) not in text
    noted = {"chat template", "versions", "optimizer", "optimizer settings"}
    assert set(json.loads(text)) == {*CHANGES, *noted}
