"""Limits of the model that rows and tokenizer must respect: vocabulary and positions."""

import logging

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import plain_rows, tiny_model, trainer_for

from lite_orpo.errors import ModelError


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(50)
    with pytest.raises(ModelError, match=r"token ids up to \d+, but the model embeds 50"):
        trainer_for(model, tmp_path)


def test_rows_never_run_past_the_models_positions(tmp_path, caplog):
    model = tiny_model()
    model.config.max_position_embeddings = 40
    rows = plain_rows(20)
    rows[3] = {"prompt": "p" * 40, "chosen": "yes", "rejected": "no"}
    with caplog.at_level(logging.WARNING, logger="lite_orpo"):
        trainer = trainer_for(model, tmp_path, rows, max_length=64)
    assert "max_length 64 is beyond the model's 40 positions: 40 is used" in caplog.text
    assert max(row["length"] for row in trainer.train_dataset) <= 40


def test_an_adapter_loaded_for_inference_is_refused_with_the_way_to_load_it(tmp_path):
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    wrapped.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ModelError, match="is_trainable=True"):
        trainer_for(frozen, tmp_path)
