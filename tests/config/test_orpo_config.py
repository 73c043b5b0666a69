"""ORPOConfig: the three names of two numbers, and defaults that work without a GPU."""

import pickle

import pytest
from transformers import TrainingArguments

from lite_orpo import ORPOConfig
from lite_orpo.errors import ConfigError


def test_it_is_a_transformers_training_arguments(tmp_path):
    assert isinstance(ORPOConfig(output_dir=str(tmp_path)), TrainingArguments)


@pytest.mark.parametrize(
    ("given", "weight", "temperature"),
    [
        ({}, 0.1, 1.0),
        ({"beta": 0.25}, 0.25, 1.0),
        ({"orpo_alpha": 1.0, "orpo_beta": 0.1}, 1.0, 0.1),
        ({"orpo_alpha": 0.5}, 0.5, 1.0),
        ({"orpo_beta": 0.5}, 0.1, 0.5),
        ({"beta": 0.0}, 0.0, 1.0),
    ],
)
def test_strength_and_temperature_have_their_names(given, weight, temperature):
    config = ORPOConfig(**given)
    assert config.odds_ratio_weight == weight
    assert config.odds_ratio_temperature == temperature


def test_mixing_beta_with_the_courses_names_is_refused():
    with pytest.raises(ConfigError, match="beta and orpo_alpha and orpo_beta are both set"):
        ORPOConfig(beta=0.1, orpo_alpha=1.0, orpo_beta=0.1)


def test_defaults_fit_a_cpu():
    config = ORPOConfig(use_cpu=True)
    assert not config.bf16 and not config.fp16
    assert not config.gradient_checkpointing
    assert not config.dataloader_pin_memory


def test_gradient_checkpointing_is_taken_under_the_name_everybody_writes():
    assert ORPOConfig(use_cpu=True, gradient_checkpointing=True).gradient_checkpointing


def test_a_hidden_nan_and_dropped_columns_cannot_be_asked_for():
    config = ORPOConfig(logging_nan_inf_filter=True, remove_unused_columns=True)
    assert not config.logging_nan_inf_filter
    assert not config.remove_unused_columns


def test_a_pickle_of_the_arguments_has_no_token(tmp_path):
    """transformers writes one beside each checkpoint that it pushes, and uploads it."""
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_secret", beta=0.3)
    pickled = pickle.dumps(args)
    assert b"hf_secret" not in pickled
    assert args.hub_token == "hf_secret"
    again = pickle.loads(pickled)
    assert again.beta == 0.3
    assert again.hub_token is None
