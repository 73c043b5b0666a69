"""The course's notebooks run as they are written, with only the import changed; steps are cut."""

import importlib.util
import inspect

import datasets
import pytest
import torch
from course_data import base_model, hh_rlhf, orpo_dpo_mix, ultrafeedback
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from lite_orpo import ORPOConfig, ORPOTrainer, setup_chat_format
from lite_orpo.errors import HubError

OLD_NAMES = pytest.mark.filterwarnings("ignore:ORPOConfig. names of earlier versions:UserWarning")


@pytest.fixture
def model_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the notebooks write beside themselves
    return base_model(tmp_path / "base")


def loaded(model_name):
    model = AutoModelForCausalLM.from_pretrained(model_name)
    return model, AutoTokenizer.from_pretrained(model_name)


@OLD_NAMES
def test_the_orpo_notebook(model_name, tmp_path):
    dataset = ultrafeedback()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=model_name, dtype=torch.float32
    ).to(device)
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model, tokenizer = setup_chat_format(model, tokenizer)
    finetune_name = "SmolLM2-FT-ORPO"
    finetune_tags = ["smol-course", "module_1"]

    orpo_args = ORPOConfig(
        learning_rate=8e-6,
        lr_scheduler_type="linear",
        max_length=1024,
        max_prompt_length=512,
        beta=0.1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=4,
        optim="paged_adamw_8bit" if device == "cuda" else "adamw_torch",
        max_steps=2,
        evaluation_strategy="steps",
        eval_steps=0.2,
        logging_steps=1,
        warmup_steps=10,
        report_to="none",
        output_dir="./results/",
        use_mps_device=device == "mps",
        hub_model_id=finetune_name,
    )
    trainer = ORPOTrainer(
        model=model,
        args=orpo_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"./{finetune_name}")
    with pytest.raises(HubError) as offline:
        trainer.push_to_hub(tags=finetune_tags)

    assert "'SmolLM2-FT-ORPO' cannot be pushed to the hub" in str(offline.value)
    assert "\n" not in str(offline.value)
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluated] == [1, 2]
    assert trainer.evaluate()["eval_rewards/accuracies"] >= 0
    assert (tmp_path / "SmolLM2-FT-ORPO" / "model.safetensors").is_file()
    assert trainer.args.overlong_rows == "cut_prompt"

    generator = pipeline("text-generation", model="./SmolLM2-FT-ORPO", tokenizer=tokenizer)
    message = {"role": "user", "content": "Hi"}
    (answer,) = generator([message], max_new_tokens=3)
    assert answer["generated_text"][0] == message
    assert answer["generated_text"][1]["role"] == "assistant"


@OLD_NAMES
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_the_notebook_with_an_adapter(model_name, tmp_path):
    model, tokenizer = loaded(model_name)
    model, tokenizer = setup_chat_format(model, tokenizer)
    dataset = orpo_dpo_mix()["train"].shuffle(seed=42).train_test_split(test_size=0.25)
    peft_config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, task_type="CAUSAL_LM", target_modules=["q_proj"]
    )

    orpo_args = ORPOConfig(
        learning_rate=8e-6,
        beta=0.1,
        lr_scheduler_type="linear",
        max_length=1024,
        max_prompt_length=512,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=4,
        optim="paged_adamw_8bit",
        num_train_epochs=1,
        evaluation_strategy="steps",
        eval_steps=0.2,
        logging_steps=1,
        warmup_ratio=0.1,
        group_by_length=True,
        report_to="none",
        output_dir="./results/",
    )
    trainer = ORPOTrainer(
        model=model,
        args=orpo_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=peft_config,
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.save_model("OrpoLlama")

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_name), "OrpoLlama")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert again.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_messages_that_the_notebook_has_turned_into_text_train_as_the_messages_do(model_name):
    model, tokenizer = loaded(model_name)
    model, tokenizer = setup_chat_format(model, tokenizer)
    dataset = orpo_dpo_mix()["train"]

    def format_chat_template(row):
        row["chosen"] = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
        row["rejected"] = tokenizer.apply_chat_template(row["rejected"], tokenize=False)
        return row

    columns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    as_text, as_messages = (
        ORPOTrainer(
            model, ORPOConfig(), train_dataset=rows, processing_class=tokenizer
        ).train_dataset
        for rows in (dataset.map(format_chat_template), dataset)
    )
    for name in columns:
        assert [list(row[name]) for row in as_text] == [list(row[name]) for row in as_messages]


def test_the_snippet_on_transcripts_given_with_all_splits(model_name):
    model, tokenizer = loaded(model_name)
    dataset = hh_rlhf()
    orpo_config = ORPOConfig(
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=2,
        orpo_alpha=1.0,
        orpo_beta=0.1,
        eval_strategy="epoch",
    )
    trainer = ORPOTrainer(model=model, args=orpo_config, train_dataset=dataset, tokenizer=tokenizer)
    trainer.train()
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (8, 4)
    assert trainer.evaluate()["eval_loss"] > 0


@OLD_NAMES
def test_a_model_named_in_the_arguments_alone(model_name):
    args = ORPOConfig(model_name_or_path=model_name, max_steps=1, report_to="none")
    trainer = ORPOTrainer(args=args, train_dataset=hh_rlhf()["train"])
    assert trainer.train().global_step == 1
    assert trainer.model.name_or_path == model_name


@OLD_NAMES
def test_how_a_named_model_is_loaded(model_name):
    kwargs = {"torch_dtype": "float32", "attn_implementation": "eager", "use_cache": False}
    args = ORPOConfig(model_init_kwargs=kwargs, trust_remote_code=False, max_steps=1)
    trainer = ORPOTrainer(model_name, args, train_dataset=hh_rlhf()["train"])
    assert trainer.model.dtype == torch.float32
    assert trainer.model.config._attn_implementation == "eager"


def test_the_call_has_trls_arguments_in_trls_order():
    theirs = list(inspect.signature(TRLTrainer.__init__).parameters)
    ours = list(inspect.signature(ORPOTrainer.__init__).parameters)
    assert ours == [*theirs, "tokenizer"]


def test_no_arguments_and_trls_order_of_them(model_name):
    model, tokenizer = loaded(model_name)
    sets = hh_rlhf()
    trainer = ORPOTrainer(model, None, None, sets["train"], sets["test"], tokenizer)
    assert trainer.args.odds_ratio_weight == 0.1
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_function_that_makes_the_model(model_name):
    args = ORPOConfig(max_steps=1)
    trainer = ORPOTrainer(
        args=args,
        train_dataset=hh_rlhf()["train"],
        model_init=lambda: AutoModelForCausalLM.from_pretrained(model_name),
    )
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("comes_from", ["get_peft_model", "a folder"])
def test_a_model_that_is_wrapped_already(model_name, comes_from):
    model, tokenizer = loaded(model_name)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if comes_from == "a folder":
        wrapped.save_pretrained("adapter")
        model, _ = loaded(model_name)
        wrapped = PeftModel.from_pretrained(model, "adapter", is_trainable=True)
    wrapped, tokenizer = setup_chat_format(wrapped, tokenizer)
    args = ORPOConfig(max_steps=1, learning_rate=1e-2)
    trainer = ORPOTrainer(
        wrapped, args, train_dataset=ultrafeedback()["train"], processing_class=tokenizer
    )
    trainer.train()
    assert trainer.model is wrapped
    assert any(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)


@OLD_NAMES
def test_several_held_out_sets_are_evaluated_each_under_its_name(model_name):
    model, tokenizer = loaded(model_name)
    sets = hh_rlhf()
    held_out = datasets.DatasetDict({"helpful": sets["test"], "harmless": sets["test"]})
    args = ORPOConfig(max_steps=1, evaluation_strategy="steps", eval_steps=1)
    trainer = ORPOTrainer(
        model, args, train_dataset=sets, eval_dataset=held_out, tokenizer=tokenizer
    )
    trainer.train()
    keys = set().union(*trainer.state.log_history)
    assert {"eval_helpful_loss", "eval_harmless_rewards/margins"} <= keys


@OLD_NAMES
def test_tensorboard_finds_our_metrics_in_logging_dir(model_name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, tokenizer = loaded(model_name)
    args = ORPOConfig(
        max_steps=2, logging_steps=1, logging_dir="~/logs", report_to="tensorboard",
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    sets = hh_rlhf()
    trainer = ORPOTrainer(
        model, args, train_dataset=sets["train"], eval_dataset=sets["test"], tokenizer=tokenizer
    )
    trainer.train()
    (file,) = (tmp_path / "logs").glob("events.out.tfevents.*")
    assert not list(tmp_path.glob("trainer_output/runs"))
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    names = {"loss", "rewards/margins", "rewards/accuracies", "nll_loss", "log_odds_chosen"}
    assert {f"{part}/{name}" for part in ("train", "eval") for name in names} <= tags
    assert "train/lite_orpo/tokens_per_second" in tags
    logged = [line["rewards/margins"] for line in trainer.state.log_history if "loss" in line]
    written = [event.value for event in events.Scalars("train/rewards/margins")]
    assert written == pytest.approx(logged, rel=1e-6)


@OLD_NAMES
def test_a_tracker_that_is_not_installed_is_named(model_name, monkeypatch):
    find_spec = importlib.util.find_spec

    def without_trackio(name, *rest):
        return None if name == "trackio" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_trackio)
    model, tokenizer = loaded(model_name)
    args = ORPOConfig(max_steps=1, report_to="trackio")
    with pytest.raises((ImportError, RuntimeError), match="pip install trackio") as caught:
        ORPOTrainer(model, args, train_dataset=hh_rlhf()["train"], tokenizer=tokenizer)
    assert len(str(caught.value).splitlines()) == 1
