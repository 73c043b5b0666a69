"""The reference of DPO: the same model before its training, scored once, and kept."""

import logging

import pytest
import torch
from safetensors.torch import load, load_file
from tiny_models import TOKENIZER, plain_rows, tiny_model, trainer_for, with_lora

from lite_orpo.errors import ConfigError

SETTINGS = {
    "loss_type": "dpo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "max_steps": 4,
}


def cached(folder):
    return sorted(folder.glob("reference_logps-*.safetensors"))


def plain_scores(model, pairs):
    """Summed log-probabilities from full logits, one sequence at a time."""
    sums = []
    for pair in pairs:
        for column in ("chosen_input_ids", "rejected_input_ids"):
            ids = torch.tensor([pair["prompt_input_ids"] + pair[column]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            own = logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(own[len(pair["prompt_input_ids"]) - 1 :].sum()))
    return sums[0::2], sums[1::2]


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_pair_scores_are_those_of_full_logits(sharing, tmp_path):
    model = with_lora(tiny_model())
    trainer = trainer_for(model, tmp_path, plain_rows(150), prefix_sharing=sharing)
    scores = trainer.score_pairs(trainer.train_dataset)
    chosen, rejected = plain_scores(model.eval(), trainer.train_dataset)
    # Sums of up to 100 nats in fp32.
    assert scores.chosen.tolist() == pytest.approx(chosen, rel=1e-5)
    assert scores.rejected.tolist() == pytest.approx(rejected, rel=1e-5)
    lengths = [len(pair["rejected_input_ids"]) for pair in trainer.train_dataset]
    assert scores.rejected_tokens.tolist() == lengths
    assert scores.rows.tolist() == list(range(150))


def test_with_an_adapter_the_reference_is_the_base_model(tmp_path):
    base = tiny_model()
    chosen, rejected = plain_scores(base.eval(), trainer_for(base, tmp_path).train_dataset)
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, **SETTINGS)
    trainer.train()
    found = trainer.train_dataset
    assert found["reference_chosen_logps"][:] == pytest.approx(chosen, rel=1e-5)
    assert found["reference_rejected_logps"][:] == pytest.approx(rejected, rel=1e-5)


def test_a_model_that_trains_in_full_is_its_own_reference_before_it_trains(tmp_path):
    model = tiny_model()
    trainer = trainer_for(model, tmp_path, eval_dataset=plain_rows(3), **SETTINGS)
    chosen, _ = plain_scores(model.eval(), trainer.train_dataset)
    trainer.train()
    assert trainer.train_dataset["reference_chosen_logps"][:] == pytest.approx(chosen, rel=1e-5)
    assert trainer.evaluate()["eval_rewards/chosen"] != 0
    with pytest.raises(ConfigError, match="the model before its training, which is gone"):
        trainer.evaluate(plain_rows(5))


def test_without_training_dpos_loss_is_the_logarithm_of_two(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path, eval_dataset=plain_rows(3), loss_type="dpo")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_each_pair_passes_the_reference_once_for_runs_with_the_same_model_and_pairs(
    tmp_path, monkeypatch, caplog
):
    cache = str(tmp_path / "cache")
    first = trainer_for(with_lora(tiny_model()), tmp_path / "a", reference_cache=cache, **SETTINGS)
    first.train()
    (path,) = cached(tmp_path / "cache")
    assert load_file(path)["reference_chosen_logps"].shape == (4,)
    second = trainer_for(
        with_lora(tiny_model(), seed=7), tmp_path / "b", reference_cache=cache, beta=0.4, **SETTINGS
    )
    monkeypatch.setattr("lite_orpo.reference.score_pairs", None)  # would fail if it were called
    with caplog.at_level(logging.INFO):
        second.train()
    assert "are read from reference_logps-" in caplog.text
    assert second.train_dataset[:] == first.train_dataset[:]


@pytest.mark.parametrize("change", ["pairs", "weights"])
def test_other_pairs_or_another_model_are_scored_anew(change, tmp_path):
    trainer_for(with_lora(tiny_model()), tmp_path, **SETTINGS).train()
    rows = plain_rows(5) if change == "pairs" else plain_rows(4)
    model = tiny_model(seed=3) if change == "weights" else tiny_model()
    trainer_for(with_lora(model), tmp_path, rows, **SETTINGS).train()
    assert len(cached(tmp_path)) == 2


def test_a_damaged_file_is_computed_anew_and_said(tmp_path, caplog):
    trainer_for(with_lora(tiny_model()), tmp_path, **SETTINGS).train()
    (path,) = cached(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    trainer_for(with_lora(tiny_model()), tmp_path, **SETTINGS).train()
    assert "cannot be read" in caplog.text
    # Beside them the file has the seconds that it took.
    good, anew = load(content), load(path.read_bytes())
    assert anew.keys() == good.keys() and all(torch.equal(anew[k], good[k]) for k in good)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "sft"])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(loss_type, tmp_path):
    settings = {**SETTINGS, "loss_type": loss_type, "save_strategy": "steps", "save_steps": 2}

    def run(folder, **arguments):
        model = with_lora(tiny_model(), lora_dropout=0.3)
        trainer = trainer_for(model, folder, plain_rows(7), **settings)
        trainer.train(**arguments)
        return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    unbroken = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(left, right) for left, right in zip(unbroken, resumed, strict=True))


def test_another_loss_is_a_difference_that_resuming_names(tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}
    trainer_for(with_lora(tiny_model()), tmp_path, **settings).train()
    other = trainer_for(
        with_lora(tiny_model()), tmp_path, **{**settings, "loss_type": "ipo", "max_steps": 6}
    )
    with pytest.raises(Exception, match="differs in: loss settings"):
        other.train(resume_from_checkpoint=True)


def test_several_held_out_sets_each_have_their_reference(tmp_path):
    sets = {"a": plain_rows(3), "b": plain_rows(5)}
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, eval_dataset=sets, **SETTINGS)
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()


def test_rows_without_the_datasets_library_have_their_reference_too(tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, **SETTINGS)
    rows = [dict(row) for row in trainer.train_dataset]
    (first, *_) = trainer._reference.on(trainer, rows)
    assert first["reference_chosen_logps"] < 0
    assert TOKENIZER.eos_token_id in first["chosen_input_ids"]
