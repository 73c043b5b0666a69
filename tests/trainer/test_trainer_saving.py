"""Saving, resuming and repeating a run; the best model; activation checkpointing."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import (
    TOKENIZER,
    GradientRecorder,
    plain_rows,
    quiet_config,
    relative_error,
    tiny_model,
    trainer_for,
    with_lora,
)
from transformers import AutoModelForCausalLM


def weights_of(trainer):
    state = trainer.model.state_dict()
    return {name: value.clone() for name, value in state.items()}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- one seed, one result ----

DROPOUT = {"lora_dropout": 0.2}


def dropout_run(folder, resume=None, **settings):
    """Five pairs, accumulated by two: three steps an epoch, the last one of a single batch."""
    trainer = trainer_for(
        with_lora(tiny_model(), **DROPOUT),
        folder,
        plain_rows(5),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.01,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_two_runs_with_one_seed_are_bit_identical_and_another_seed_is_not(tmp_path):
    first, second, other = (dropout_run(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert_bit_equal(weights_of(first), weights_of(second))
    losses = [[log.get("loss") for log in t.state.log_history] for t in (first, second, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("order", ["random", "group_by_length", "sequential"])
@pytest.mark.parametrize("step", [1, 3, 4], ids=["mid_epoch", "epoch_end", "second_epoch"])
def test_a_resumed_run_is_bit_exact(step, order, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": order}
    straight = dropout_run(tmp_path, **saving)
    assert straight.state.global_step == 6
    resumed = dropout_run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **saving)
    assert_bit_equal(weights_of(straight), weights_of(resumed))

    def logged(trainer):
        return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]

    assert logged(resumed) == logged(straight)


# ---- activation checkpointing ----


def frozen_embedding():
    model = tiny_model(tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: with_lora(tiny_model()), tiny_model, frozen_embedding],
    ids=["lora", "full", "frozen_embedding"],
)
def test_checkpointing_in_both_modes_gives_the_same_gradients(make, tmp_path):
    gradients = []
    for use_reentrant in (None, False, True):
        settings = {}
        if use_reentrant is not None:
            settings["gradient_checkpointing"] = True
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        recorder = GradientRecorder()
        trainer = trainer_for(
            make(),
            tmp_path,
            callbacks=[recorder],
            max_steps=1,
            max_grad_norm=0.0,
            **settings,
        )
        trainer.train()
        backbone = trainer.head.causal_lm.model
        assert all(layer.gradient_checkpointing == bool(settings) for layer in backbone.layers), (
            "the setting did not arrive"
        )
        gradients.append(recorder.steps[0])
    for checkpointed in gradients[1:]:
        # Recomputed by the same operations: a rounding at most.
        assert relative_error(checkpointed, gradients[0]) <= 1e-6


def test_gradient_checkpointing_may_be_asked_for_by_its_older_name_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = quiet_config(tmp_path, gradient_checkpointing=True)
        assert args.gradient_checkpointing
        assert not quiet_config(tmp_path).gradient_checkpointing


# ---- saving ----


def test_save_model_writes_the_adapter_and_no_pickled_arguments(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-1"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
        assert "training_args.bin" not in names
        adapter = load_file(folder / "adapter_model.safetensors")
        assert {"lora_A", "lora_B"} == {name.split(".")[-2] for name in adapter}
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()
    ids = torch.tensor([TOKENIZER("say tea: ")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_whole_model_is_saved_and_loads_again(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_bit_equal(loaded.state_dict(), trainer.model.state_dict())


def test_state_and_metrics_can_be_written(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, eval_dataset=plain_rows(3), max_steps=2
    )
    result = trainer.train()
    assert result.metrics["train_loss"] == pytest.approx(
        sum(log["loss"] for log in trainer.state.log_history if "loss" in log) / 2
    )
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    assert "eval_rewards/margins" in json.loads((tmp_path / "eval_results.json").read_text())
    assert trainer.state.total_flos > 0


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # Two steps down, then two up, so that the best is not the last.
    model = with_lora(tiny_model())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    there_and_back = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 if n < 2 else -9)
    trainer = trainer_for(
        model,
        tmp_path,
        eval_dataset=plain_rows(4),
        optimizers=(optimizer, there_and_back),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses.index(min(losses)) == 1
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_metric_of_ours_can_choose_the_best_model(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        eval_dataset=plain_rows(3),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
    )
    trainer.train()
    margins = [
        log["eval_rewards/margins"] for log in trainer.state.log_history if "eval_loss" in log
    ]
    assert trainer.state.best_metric == max(margins)


# ---- whose checkpoints they are ----


def test_that_fsdp_writes_its_checkpoints_itself_is_announced_once(tmp_path, caplog):
    """A sharded run needs GPUs to start; it is told before that."""
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, max_steps=1)
    trainer.is_fsdp_enabled = True
    with pytest.raises(AttributeError, match="fsdp_plugin"):
        trainer.train()
    assert caplog.text.count("written and read by FSDP's own libraries") == 1
    caplog.clear()
    trainer_for(with_lora(tiny_model()), tmp_path, max_steps=1).train()
    assert "FSDP" not in caplog.text
