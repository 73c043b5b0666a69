"""The widely copied course snippet runs with only its import changed; so do TRL's names."""

import datasets
import pytest
from tiny_models import TOKENIZER, plain_rows, tiny_model, with_lora

from lite_orpo import ORPOConfig, ORPOTrainer


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def dataset():
    return datasets.Dataset.from_list(plain_rows(40))


def test_the_snippet_trains(model, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it names no output folder
    tokenizer = TOKENIZER
    before = model.lm_head.weight.detach().clone()

    orpo_config = ORPOConfig(
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=2,
        orpo_alpha=1.0,
        orpo_beta=0.1,
    )
    trainer = ORPOTrainer(
        model=model,
        args=orpo_config,
        train_dataset=dataset,
        tokenizer=tokenizer,
    )
    result = trainer.train()

    assert trainer.state.global_step == 2
    assert 0 < result.training_loss < 20
    assert not model.lm_head.weight.equal(before)
    assert trainer.args.odds_ratio_weight == 1.0
    assert trainer.args.odds_ratio_temperature == 0.1
    assert trainer.processing_class is tokenizer


def test_trls_call_trains(dataset, tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), beta=0.2, max_steps=1, max_length=512)
    trainer = ORPOTrainer(
        model=with_lora(tiny_model()),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=TOKENIZER,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert args.odds_ratio_weight == 0.2
    assert args.odds_ratio_temperature == 1.0


def test_the_defaults_fit_a_cpu(tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not args.bf16
    assert not args.fp16
    assert not args.gradient_checkpointing
    assert args.odds_ratio_weight == 0.1
    assert args.odds_ratio_temperature == 1.0
