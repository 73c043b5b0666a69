"""What would train silently wrong is refused, in one line that says what to do."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from tiny_models import TOKENIZER, plain_rows, quiet_config, tiny_model, trainer_for, with_lora
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments
from trl.experimental.orpo import ORPOConfig as TRLConfig

from lite_orpo import ORPOConfig, ORPOTrainer
from lite_orpo.errors import ConfigError, DataError, ModelError, UserError


def refusal(kind: type[UserError], call) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def tiny_t5():
    config = T5Config(vocab_size=106, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


def test_an_encoder_decoder_model(tmp_path):
    message = refusal(ModelError, lambda: trainer_for(tiny_t5(), tmp_path))
    assert "encoder-decoder" in message
    assert "T5ForConditionalGeneration" in message


def test_an_encoder_decoder_model_by_its_folder(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "t5")
    TOKENIZER.save_pretrained(tmp_path / "t5")
    message = refusal(ModelError, lambda: trainer_for(str(tmp_path / "t5"), tmp_path))
    assert "encoder-decoder" in message


def test_no_model_and_a_folder_that_is_none(tmp_path):
    assert "needs a model" in refusal(ModelError, lambda: trainer_for(None, tmp_path))
    message = refusal(ModelError, lambda: trainer_for("./no/such/folder", tmp_path))
    assert "no such folder" in message
    (tmp_path / "empty").mkdir()
    message = refusal(ModelError, lambda: trainer_for(str(tmp_path / "empty"), tmp_path))
    assert "no config.json" in message


def test_virtual_tokens_in_front_of_the_prompt(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    message = refusal(ModelError, lambda: trainer_for(tiny_model(), tmp_path, peft_config=config))
    assert "PROMPT_TUNING" in message
    assert "use LoRA" in message


def test_virtual_tokens_on_a_model_that_is_already_wrapped(tmp_path):
    from peft import get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_model(), config)
    assert "virtual tokens" in refusal(ModelError, lambda: trainer_for(model, tmp_path))


def test_a_second_adapter(tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear")
    model = with_lora(tiny_model())
    message = refusal(ModelError, lambda: trainer_for(model, tmp_path, peft_config=config))
    assert "already has an adapter" in message


@pytest.mark.parametrize("config", [{"r": 4}, "lora"], ids=["dict", "str"])
def test_a_peft_config_that_is_none(config, tmp_path):
    message = refusal(ModelError, lambda: trainer_for(tiny_model(), tmp_path, peft_config=config))
    assert "LoraConfig" in message


def test_an_adapter_whose_target_modules_do_not_exist(tmp_path):
    config = LoraConfig(r=2, target_modules=["query_key_value"])
    message = refusal(ModelError, lambda: trainer_for(tiny_model(), tmp_path, peft_config=config))
    assert "does not fit LlamaForCausalLM" in message
    assert "query_key_value" in message


def test_nothing_to_train(tmp_path):
    message = refusal(ModelError, lambda: trainer_for(tiny_model().requires_grad_(False), tmp_path))
    assert "no parameter of the model is trainable" in message


@pytest.mark.parametrize("kind", [TrainingArguments, TRLConfig], ids=["transformers", "trl"])
def test_arguments_of_another_trainer(kind, tmp_path):
    args = kind(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    message = refusal(
        ConfigError,
        lambda: ORPOTrainer(
            tiny_model(), args, train_dataset=plain_rows(2), processing_class=TOKENIZER
        ),
    )
    assert "lite_orpo.ORPOConfig" in message


def test_several_gpus_without_a_launcher(tmp_path):
    class OnTwoGPUs(ORPOConfig):
        n_gpu = 2

    args = OnTwoGPUs(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    message = refusal(
        ConfigError,
        lambda: ORPOTrainer(
            tiny_model(), args, train_dataset=plain_rows(2), processing_class=TOKENIZER
        ),
    )
    assert "accelerate launch --num_processes 2" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.1, "orpo_alpha": 1.0}, "beta and orpo_alpha are both set"),
        ({"beta": 0.1, "orpo_beta": 1.0}, "beta and orpo_beta are both set"),
        ({"beta": -0.1}, "beta must be a number and not negative"),
        ({"beta": float("nan")}, "beta must be a number and not negative"),
        ({"orpo_alpha": -1.0}, "orpo_alpha must be a number and not negative"),
        ({"orpo_beta": 0.0}, "orpo_beta must be a positive number"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"nll_tokens": "all"}, "prompt_and_completion or completion"),
        ({"overlong_rows": "truncate"}, "drop or cut_prompt"),
        ({"on_bad_row": "skip"}, "drop or error"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"loss_workspace_mib": 0}, "loss_workspace_mib"),
    ],
)
def test_settings_that_contradict_each_other_or_lie_outside_their_range(settings, words, tmp_path):
    assert words in refusal(ConfigError, lambda: quiet_config(tmp_path, **settings))


def test_the_routers_auxiliary_loss(tmp_path):
    model = tiny_model("mixtral", output_router_logits=True)
    message = refusal(ModelError, lambda: trainer_for(model, tmp_path))
    assert "output_router_logits" in message
    assert "set it to false" in message


def test_a_model_that_does_not_name_its_tokenizer(tmp_path):
    args = quiet_config(tmp_path)
    message = refusal(ModelError, lambda: ORPOTrainer(tiny_model(), args, None, plain_rows(2)))
    assert "pass processing_class" in message


def test_two_different_tokenizers(tmp_path):
    from tiny_tokenizer import char_tokenizer

    message = refusal(
        ConfigError,
        lambda: ORPOTrainer(
            tiny_model(),
            quiet_config(tmp_path),
            train_dataset=plain_rows(2),
            processing_class=TOKENIZER,
            tokenizer=char_tokenizer(),
        ),
    )
    assert "processing_class and tokenizer are both set" in message


def test_rows_that_cannot_be_used(tmp_path):
    rows = [{"prompt": "q", "chosen": "a"}]
    message = refusal(DataError, lambda: trainer_for(tiny_model(), tmp_path, rows))
    assert message.startswith("train_dataset: none of 1 rows can be trained on")
    assert "column 'rejected' is missing" in message
    message = refusal(DataError, lambda: trainer_for(tiny_model(), tmp_path, {"train": rows}))
    assert "dictionary of splits" in message
    message = refusal(
        DataError, lambda: trainer_for(tiny_model(), tmp_path, on_bad_row="error", rows=rows)
    )
    assert message.startswith("train_dataset row 0: column 'rejected' is missing")


def test_a_nan_loss_is_not_hidden(tmp_path):
    model = with_lora(tiny_model())
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight[0, 0] = float("nan")
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["loss"] != log["loss"]
    assert log["lite_orpo/refused_steps"] == 1
