"""Names of earlier transformers, TRL and the notebooks: translated in one warning, or refused."""

import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl.experimental.orpo import ORPOConfig as TRLConfig

from lite_orpo import ORPOConfig
from lite_orpo.cli.check_target import resolve_target
from lite_orpo.config.legacy_names import KEPT_NAMES, LEGACY_NAMES, translate
from lite_orpo.config.run_config import load_run_config
from lite_orpo.config.yaml_file import Setting, write_settings
from lite_orpo.errors import ConfigError


def names(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def made(**settings) -> tuple[ORPOConfig, str]:
    """The configuration, and the one warning that making it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = ORPOConfig(use_cpu=True, **settings)
    ours = [w for w in caught if issubclass(w.category, UserWarning)]
    assert len(ours) == 1
    assert ours[0].filename == __file__
    message = str(ours[0].message)
    assert "\n" not in message
    return config, message


# What transformers 4.57's TrainingArguments and TRL 0.9 to 0.23's ORPOConfig had besides.
FORMER_ARGUMENTS = """
overwrite_output_dir evaluation_strategy eval_strategy per_gpu_train_batch_size
per_gpu_eval_batch_size warmup_ratio warmup_steps logging_dir save_safetensors no_cuda use_cpu
use_mps_device jit_mode_eval use_ipex fp16_opt_level half_precision_backend fp16_backend
tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params dispatch_batches split_batches
fsdp_transformer_layer_cls_to_wrap adafactor group_by_length use_legacy_prediction_loop
include_inputs_for_metrics push_to_hub_model_id push_to_hub_organization push_to_hub_token
mp_parameters torchdynamo ray_scope include_tokens_per_second xpu_backend sharded_ddp local_rank
gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha auto_find_batch_size
max_length max_prompt_length max_completion_length beta disable_dropout label_pad_token_id
padding_value truncation_mode generate_during_eval is_encoder_decoder model_init_kwargs
dataset_num_proc
""".split()


@pytest.mark.parametrize("name", sorted({*FORMER_ARGUMENTS, *names(TRLConfig)}))
def test_every_argument_of_earlier_transformers_and_trl_is_known(name):
    assert (name in names(ORPOConfig)) != (name in LEGACY_NAMES)


@pytest.mark.parametrize(
    ("given", "new", "value"),
    [
        ({"evaluation_strategy": "steps", "eval_steps": 0.2}, "eval_strategy", "steps"),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"warmup_ratio": 0}, "warmup_steps", 0),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"adafactor": True}, "optim", "adafactor"),
        ({"adafactor": False}, "optim", ORPOConfig(use_cpu=True).optim),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"push_to_hub_token": "hf_x"}, "hub_token", "hf_x"),
        ({"max_prompt_length": 512}, "overlong_rows", "cut_prompt"),
        ({"max_prompt_length": None}, "overlong_rows", "drop"),
        ({"max_prompt_length": 512, "overlong_rows": "drop"}, "overlong_rows", "drop"),
        ({"evaluation_strategy": None}, "eval_strategy", "no"),
        ({"use_mps_device": True}, "use_cpu", True),
        ({"truncation_mode": "keep_end"}, "max_length", 1024),
        ({"is_encoder_decoder": False}, "max_length", 1024),
        ({"logging_dir": "logs"}, "logging_dir", "logs"),
        ({"model_name_or_path": "some/model"}, "model_name_or_path", "some/model"),
    ],
    ids=str,
)
def test_an_old_name_sets_what_it_means_today(given, new, value):
    config, message = made(**given)
    assert getattr(config, new) == value
    for name in given.keys() & LEGACY_NAMES:
        assert name in message
    assert "hf_x" not in message


def test_no_cuda_is_use_cpu():
    with pytest.warns(UserWarning, match="no_cuda is use_cpu"):
        assert ORPOConfig(no_cuda=True).use_cpu


def test_a_warm_up_ratio_warms_up_that_share_of_the_steps():
    config, _ = made(warmup_ratio=0.1)
    assert config.get_warmup_steps(1000) == 100


def test_many_old_names_are_one_warning():
    _, message = made(
        evaluation_strategy="steps", use_mps_device=False, warmup_ratio=0.1, max_prompt_length=9
    )
    assert "evaluation_strategy is eval_strategy; use_mps_device has no effect" in message
    assert "warmup_ratio is warmup_steps" in message
    assert "max_prompt_length is overlong_rows='cut_prompt'" in message


def test_names_of_today_warn_of_nothing():
    ORPOConfig(use_cpu=True, eval_strategy="steps", eval_steps=0.2)  # warnings are errors here


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluation_strategy": "no", "eval_strategy": "no"}, "today's eval_strategy, and eval_"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "warmup_ratio is today's warmup_steps"),
        ({"no_cuda": True, "use_cpu": True}, "give use_cpu alone"),
        ({"adafactor": True, "optim": "adamw_torch"}, "adafactor is today's optim"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be a share of the steps"),
        ({"warmup_ratio": "a tenth"}, "warmup_ratio must be a share of the steps"),
        ({"group_by_length": "yes"}, "group_by_length must be true or false, found 'yes'"),
        ({"max_prompt_length": 0}, "max_prompt_length must be a positive number"),
        ({"is_encoder_decoder": True}, "only decoder-only causal language models"),
        ({"truncation_mode": "keep_start"}, "truncation_mode='keep_start' cannot be had"),
        ({"label_smoothing": 0.1}, "not part of ORPO's loss"),
        ({"generate_during_eval": True}, "`lite-orpo train` shows samples"),
        ({"save_safetensors": False}, "files are always safetensors"),
        ({"half_precision_backend": "apex"}, "half_precision_backend='apex' cannot be had"),
        ({"tpu_num_cores": 8}, "TPUs are not supported"),
        ({"jit_mode_eval": True}, "there is no such mode"),
        ({"push_to_hub_organization": "us"}, "set hub_model_id='organisation/name'"),
        ({"beta": 0.1, "orpo_alpha": 1.0, "max_prompt_length": 5}, "beta and orpo_alpha are both"),
        ({"bf16": True, "evaluation_strategy": "no"}, "bf16: there is no GPU here"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_in_one_line(given, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_translating_leaves_what_it_was_given_and_other_names_alone():
    given = {"evaluation_strategy": "no", "not_an_argument": 1}
    done = translate(given)
    assert given == {"evaluation_strategy": "no", "not_an_argument": 1}
    assert done.settings == {"not_an_argument": 1, "eval_strategy": "no"}
    assert done.kept == {}


def test_an_unknown_argument_is_still_a_type_error():
    with pytest.raises(TypeError, match="not_an_argument"):
        ORPOConfig(not_an_argument=1, evaluation_strategy="no")


# ---- it stays a dataclass ----


def test_the_signature_shows_todays_names():
    parameters = inspect.signature(ORPOConfig).parameters
    assert "eval_strategy" in parameters
    assert LEGACY_NAMES.isdisjoint(parameters)
    assert isinstance(ORPOConfig("out", use_cpu=True), TrainingArguments)


def test_it_is_copied_replaced_and_pickled_with_what_is_kept():
    config, _ = made(model_name_or_path="some/model", warmup_ratio=0.1, beta=0.3)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (again.model_name_or_path, again.warmup_steps, again.beta) == (
            "some/model",
            0.1,
            0.3,
        )
    replaced = dataclasses.replace(config, beta=0.5)
    assert (replaced.beta, replaced.warmup_steps) == (0.5, 0.1)


def test_what_is_kept_is_written_to_no_file():
    config, _ = made(model_name_or_path="some/model", logging_dir="logs")
    assert set(KEPT_NAMES).isdisjoint(names(ORPOConfig))
    assert set(KEPT_NAMES).isdisjoint(config.to_dict())
    assert "some/model" not in config.to_json_string()


def test_transformers_parser_reads_it():
    words = ["--output_dir", "x", "--beta", "0.3", "--use_cpu", "--prefix_sharing", "off"]
    (config,) = HfArgumentParser(ORPOConfig).parse_args_into_dataclasses(words)
    assert (config.beta, config.prefix_sharing) == (0.3, "off")
    assert HfArgumentParser(ORPOConfig).parse_dict({"beta": 0.2})[0].beta == 0.2


# ---- files and the command line ----


@pytest.fixture
def load(tmp_path, caplog):
    def load_text(text: str, **overrides):
        path = tmp_path / "config.yaml"
        path.write_text(f"use_cpu: true\n{text}", encoding="utf-8")
        caplog.clear()
        settings = {key: Setting(value, "command line") for key, value in overrides.items()}
        return load_run_config(path, settings), [r.getMessage() for r in caplog.records]

    return load_text


def test_old_keys_of_a_file_and_the_command_line_are_one_warning(load):
    config, lines = load("evaluation_strategy: steps\nwarmup_ratio: 0.1\n", use_mps_device=False)
    assert config.training.eval_strategy == "steps"
    assert config.training.warmup_steps == 0.1
    assert len(lines) == 1
    for name in ("config.yaml", "evaluation_strategy", "warmup_ratio", "use_mps_device"):
        assert name in lines[0]


def test_an_override_replaces_the_file_under_either_name(load):
    assert (
        load("eval_strategy: steps\n", evaluation_strategy="no")[0].training.eval_strategy == "no"
    )
    assert (
        load("evaluation_strategy: steps\n", eval_strategy="no")[0].training.eval_strategy == "no"
    )


def test_options_of_a_run_are_no_old_names(load):
    config, lines = load("model_name_or_path: m\noverwrite_output_dir: true\n")
    assert config.model.model_name_or_path == "m"
    assert config.report.overwrite_output_dir
    assert lines == []


def test_the_resolved_configuration_says_the_same_again(load, tmp_path):
    config, _ = load("evaluation_strategy: epoch\nmax_prompt_length: 9\nlogging_dir: logs\n")
    assert config.training.logging_dir == "logs"
    write_settings(tmp_path / "again.yaml", config.as_settings())
    again = load_run_config(tmp_path / "again.yaml", {})
    assert again.training.eval_strategy == "epoch"
    assert again.training.overlong_rows == "cut_prompt"
    assert again.training.logging_dir == "logs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluation_strategy: no\neval_strategy: no", "line 2: evaluation_strategy is today's"),
        ("warmup_ratio: 2", "config.yaml line 2: warmup_ratio must be a share of the steps"),
        ("evaluation_strategy: sometimes", "line 2: eval_strategy must be one of no, steps"),
        ("truncation_mode: keep_start", "line 2: truncation_mode='keep_start' cannot be had"),
        ("model_init_kwargs: {dtype: auto}", "line 2: model_init_kwargs is for Python"),
        ("logging_dir: 3", "line 2: logging_dir must be text or null"),
        ("evaluation_strateg: no", "line 2: unknown key evaluation_strateg; did you mean"),
    ],
)
def test_a_wrong_old_key_is_one_line_with_its_place(load, text, message):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_reads_an_old_key_as_the_training_does(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("dataset_name: pairs.jsonl\nmax_prompt_length: 512\n")
    assert resolve_target(str(path)).rule.overlong_rows == "cut_prompt"
