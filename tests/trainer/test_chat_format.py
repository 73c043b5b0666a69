"""setup_chat_format: ChatML without a new row in the embedding, and asked as it was trained."""

import json
import logging
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_models import quiet_config, tiny_model, with_lora
from tiny_tokenizer import CHATML, char_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lite_orpo import ORPOTrainer, setup_chat_format
from lite_orpo.errors import ConfigError, ModelError

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"How are you, number {i}?"}],
        "chosen": [{"role": "assistant", "content": f"Well, and you? {i}"}],
        "rejected": [{"role": "assistant", "content": f"What. {i}"}],
    }
    for i in range(4)
]


def with_markers():
    """Model and tokenizer of a family that has both markers, as SmolLM2's base has."""
    return tiny_model(), char_tokenizer()


def without_markers():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = None
    return AutoModelForCausalLM.from_pretrained(DEMO), tokenizer


BOTH = pytest.mark.parametrize("family", [with_markers, without_markers])


@BOTH
def test_neither_the_vocabulary_nor_the_embedding_grows(family):
    model, tokenizer = family()
    words, embedding = len(tokenizer), model.get_input_embeddings().weight
    assert setup_chat_format(model, tokenizer) == (model, tokenizer)
    assert len(tokenizer) == words
    assert model.get_input_embeddings().weight is embedding


def test_markers_that_are_there_are_used_and_end_what_is_generated():
    model, tokenizer = setup_chat_format(*with_markers())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.config.eos_token_id == end
    assert model.generation_config.eos_token_id[0] == end
    text = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert ids.count(end) == 2


def test_markers_that_are_missing_are_spelled_and_a_turn_ends_with_the_models_eos(caplog):
    model, tokenizer = without_markers()
    eos = tokenizer.eos_token_id
    model, tokenizer = setup_chat_format(model, tokenizer)
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (eos, eos)
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert ids.count(eos) == 2
    assert max(ids) < model.config.vocab_size
    assert "written as text, and a turn ends with <|eos|>" in caplog.text


@BOTH
def test_a_model_is_asked_with_the_tokens_that_it_was_trained_on(family, tmp_path):
    model, tokenizer = setup_chat_format(*family())
    trainer = ORPOTrainer(
        model, quiet_config(tmp_path), train_dataset=ROWS, processing_class=tokenizer
    )
    for row, trained in zip(ROWS, trainer.train_dataset, strict=True):
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        assert list(trained["prompt_input_ids"]) == list(asked["input_ids"])
        assert list(trained["chosen_input_ids"]).count(tokenizer.eos_token_id) == 1
        assert trained["chosen_input_ids"][-1] == tokenizer.eos_token_id


def test_the_adapter_has_no_embedding_in_it(tmp_path):
    model, tokenizer = setup_chat_format(*without_markers())
    args = quiet_config(tmp_path, max_steps=1)
    trainer = ORPOTrainer(with_lora(model), args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as adapter:
        assert all("lora_" in name for name in adapter.keys())  # noqa: SIM118 (no mapping)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_the_model_inside_an_adapter_stops_there_too():
    model, tokenizer = with_markers()
    wrapped, tokenizer = setup_chat_format(with_lora(model), tokenizer)
    assert wrapped.get_base_model().config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id


def test_the_former_eos_ends_generation_too_and_fills_where_nothing_did():
    model, tokenizer = with_markers()
    tokenizer.pad_token = None
    former = tokenizer.eos_token_id
    model, tokenizer = setup_chat_format(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, former]
    assert tokenizer.pad_token_id == former


def test_markers_that_were_no_control_tokens_become_some():
    """As control tokens they are spelled out where they stand in somebody's words."""
    model, tokenizer = without_markers()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    words = len(tokenizer)
    setup_chat_format(model, tokenizer)
    assert len(tokenizer) == words
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 2]


def test_a_template_that_is_there_stays_and_so_does_all_else(caplog):
    model, tokenizer = tiny_model(), char_tokenizer(template=CHATML)
    setup_chat_format(model, tokenizer)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "</s>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert "which is kept" in caplog.text
    assert len(caplog.records) == 1


def test_a_multiple_to_resize_to_is_answered(caplog):
    setup_chat_format(*with_markers(), resize_to_multiple_of=64)
    assert "resize_to_multiple_of has no effect" in caplog.text


def test_it_says_nothing_where_the_markers_are_there(caplog):
    caplog.set_level(logging.INFO)
    setup_chat_format(*with_markers())
    assert caplog.text == ""


def test_another_format():
    with pytest.raises(ConfigError, match="format must be 'chatml', found 'alpaca'"):
        setup_chat_format(*with_markers(), format="alpaca")


def test_a_tokenizer_with_nothing_to_end_a_turn_with():
    model, tokenizer = without_markers()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS to end a turn with"):
        setup_chat_format(model, tokenizer)


def test_markers_of_another_models_tokenizer():
    model = tiny_model(vocab_size=5)
    with pytest.raises(ModelError, match="are tokens 4 and 5 of the tokenizer, but the model"):
        setup_chat_format(model, char_tokenizer())
