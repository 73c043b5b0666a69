"""A run's configuration: YAML + overrides -> typed options, and every mistake in one line."""

import dataclasses
from pathlib import Path

import pytest

from lite_orpo.config.options import COMMON_TRAINING_KEYS, OPTION_GROUPS
from lite_orpo.config.orpo_config import ORPOConfig
from lite_orpo.config.run_config import RunConfig, load_run_config
from lite_orpo.config.template import TEMPLATE
from lite_orpo.config.yaml_file import Setting, parse_value, read_settings, write_settings
from lite_orpo.errors import ConfigError


@pytest.fixture
def load(tmp_path: Path):
    def load_text(text: str, **overrides) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_config(path, {k: Setting(v, "command line") for k, v in overrides.items()})

    return load_text


def test_values_get_the_types_of_their_keys(load):
    config = load(
        "learning_rate: 1e-4\nnum_train_epochs: 2\nlora_target_modules: [q_proj]\n"
        "eval_strategy: no\nwarmup_steps: 3\nmax_steps: 10.0\nmax_length: null\n"
    )
    assert config.training.learning_rate == 1e-4
    assert config.training.num_train_epochs == 2.0
    assert config.training.eval_strategy == "no"
    assert config.training.max_steps == 10 and isinstance(config.training.max_steps, int)
    assert config.training.max_length is None
    assert config.lora.lora_target_modules == ["q_proj"]


def test_an_override_replaces_the_file(load):
    assert load("seed: 1\n", seed=7).training.seed == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "config.yaml line 2: unknown key learning_rat; did you mean learning"),
        ("xyzzy: 1", "unknown key xyzzy; `lite-orpo init` writes"),
        ("learning_rate: fast", "line 2: learning_rate must be a number, found 'fast'"),
        ("seed: true", "seed must be a whole number, found True"),
        ("seed: 1.5", "seed must be a whole number, found 1.5"),
        ("use_peft: 'yes'", "use_peft must be true or false, found 'yes'"),
        ("lora_target_modules: [1]", "must be a list of text, found 1"),
        ("lr_scheduler_type: wavy", "lr_scheduler_type must be one of linear, cosine"),
        ("beta: -1", "beta must be a number and not negative"),
        ("orpo_beta: 0", "orpo_beta must be a positive number"),
        ("beta: 0.1\norpo_alpha: 1.0", "beta and orpo_alpha are both set"),
        ("beta: 0.1\norpo_beta: 1.0", "beta and orpo_beta are both set"),
        ("output_dir: x", "output_dir is set twice, first at"),
        ("max_length: 1", "max_length must be at least 2"),
        ("overlong_rows: cut", "overlong_rows must be drop or cut_prompt"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor is not part of these losses"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size must be a number of at"),
        ("learning_rate: .nan", "learning_rate must be a number of at least 0"),
        ("seed: -1", "seed must be a number of at least 0"),
        ("num_train_epochs: 0", "num_train_epochs must be positive"),
        ("deepspeed: ds.json", "deepspeed is not supported yet"),
        ("prefix_sharing: maybe", "prefix_sharing must be auto or on or off, found 'maybe'"),
        ("max_tokens_per_row: 1", "max_tokens_per_row must be at least 2, or auto, found 1"),
        ("tree_attention: flash", "tree_attention must be sdpa or varlen, found 'flash'"),
        ("load_best_model_at_end: true", "load_best_model_at_end needs evaluations"),
        ("sample_prompts: -1", "sample_prompts must be at least 0"),
        ("bf16: true", "bf16: there is no GPU here"),
        ("a: [", "not valid YAML: line"),
        ("- a", "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(load, line, message):
    with pytest.raises(ConfigError) as caught:
        load(f"output_dir: out\n{line}\n")
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert "config.yaml" in text


def test_yaml_cannot_make_python_objects(load):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load("output_dir: !!python/object/apply:os.system ['true']\n")


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(ConfigError, match="lite-orpo init"):
        read_settings(tmp_path / "none.yaml")


def test_numbers_without_a_point_are_numbers():
    assert parse_value("1e-4") == 1e-4
    assert parse_value("5E3") == 5e3
    assert parse_value("1.0e-4") == 1e-4
    assert parse_value("run_1e") == "run_1e"


def test_the_resolved_settings_reproduce_the_run(load, tmp_path):
    first = load("learning_rate: 3e-4\norpo_alpha: 0.5\norpo_beta: 2.0\nlora_r: 4\nseed: 3\n")
    write_settings(tmp_path / "resolved.yaml", first.as_settings())
    again = load_run_config(tmp_path / "resolved.yaml", {})
    for field in dataclasses.fields(ORPOConfig):
        if field.init and field.name not in ("distributed_state", "deepspeed_plugin"):
            old, new = getattr(first.training, field.name), getattr(again.training, field.name)
            assert repr(old) == repr(new), field.name
    assert again.lora == first.lora and again.report == first.report


def test_a_column_mapping_is_read_and_reproduced(load, tmp_path):
    first = load("column_mapping: {prompt: question, chosen: good, system: null}\n")
    assert first.data.column_mapping == {"prompt": "question", "chosen": "good", "system": None}
    write_settings(tmp_path / "resolved.yaml", first.as_settings())
    assert load_run_config(tmp_path / "resolved.yaml", {}).data == first.data


def test_the_hub_token_is_never_written(load):
    config = load("hub_token: secret-value\n")
    assert "secret-value" not in repr(config.as_settings())


def test_the_template_is_a_valid_configuration(load):
    config = load(TEMPLATE.format(name="config.yaml"))
    assert config.training.learning_rate == 5e-5
    assert config.model.model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_every_key_named_in_help_exists():
    known = {f.name for f in dataclasses.fields(ORPOConfig)}
    assert set(COMMON_TRAINING_KEYS) <= known


def test_no_key_belongs_to_two_groups():
    names = [f.name for group in (*OPTION_GROUPS, ORPOConfig) for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))
