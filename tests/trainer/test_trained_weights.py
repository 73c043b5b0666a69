"""Weights that train must be able to take a small step, and sets come back to evaluate()."""

import logging

import pytest
from tiny_models import plain_rows, tiny_model, trainer_for
from transformers import AutoModel

from lite_orpo.errors import ModelError


def test_full_training_of_fp16_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="fp16"):
        trainer_for(tiny_model().half(), tmp_path)


def test_full_training_of_bf16_weights_says_what_is_lost(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lite_orpo"):
        trainer_for(tiny_model().bfloat16(), tmp_path)
    assert "weights that train are bf16" in caplog.text


def test_a_model_without_a_language_model_head_is_refused(tmp_path):
    backbone = AutoModel.from_config(tiny_model().config)
    with pytest.raises(ModelError, match="no language-model head"):
        trainer_for(backbone, tmp_path)


def test_the_trainers_own_set_can_be_handed_back_to_evaluate(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path, eval_dataset=plain_rows(5))
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]
