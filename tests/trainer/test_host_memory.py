"""What is kept in the host's memory changes no bit of the result, and is lost nowhere."""

import copy
import sys

import pytest
import torch
from tiny_models import (
    TOKENIZER,
    plain_rows,
    quiet_config,
    step_gradients,
    tiny_model,
    trainer_for,
    with_lora,
)
from transformers import AutoModelForCausalLM

from lite_orpo.errors import ConfigError, ModelError
from lite_orpo.model import host_memory
from lite_orpo.model.adapter import trainable_parameters
from lite_orpo.model.host_memory import (
    host_weight,
    keep_embedding_on_host,
    offloaded_activations,
)
from lite_orpo.setup import check_parallelism

# Gemma's embedding multiplies by a factor; a padding id beyond the row's length must not matter.
FAMILIES = {"llama": {}, "gemma2": {}, "granite": {}, "qwen3": {"pad_token_id": 90}}


def untied(family="llama", **settings):
    return tiny_model(family, tie_word_embeddings=False, **settings)


def one_step(model, folder, **settings):
    trainer = trainer_for(model, folder, plain_rows(6), **settings)
    return step_gradients(trainer, [list(trainer.train_dataset)])


# ---- the embedding ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_the_embedding_on_the_host_is_bitwise_the_same(family, tmp_path):
    there = one_step(with_lora(untied(family, **FAMILIES[family])), tmp_path)
    model = with_lora(untied(family, **FAMILIES[family]))
    on_host = one_step(model, tmp_path, offload_embedding=True)
    assert host_weight(model) is not None
    assert on_host[0] == there[0]
    assert there[1].keys() == on_host[1].keys()
    assert all(torch.equal(there[1][name], on_host[1][name]) for name in there[1])


def test_it_goes_with_checkpointing_and_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    from lite_orpo.config.options import ModelOptions
    from lite_orpo.model.load import load_model

    untied(hidden_size=64).save_pretrained(tmp_path)
    options = ModelOptions(model_name_or_path=str(tmp_path), load_in_4bit=True)

    def step(**settings):
        model = load_model(options, torch.device("cpu"), trains_all_weights=False)
        torch.manual_seed(0)  # for the adapter's first values
        return one_step(with_lora(model), tmp_path, gradient_checkpointing=True, **settings)

    there, on_host = step(), step(offload_embedding=True)
    assert all(torch.equal(there[1][name], on_host[1][name]) for name in there[1])


def test_the_weight_stays_where_it_is_when_the_model_moves():
    model = with_lora(untied())
    keep_embedding_on_host(model)
    model.to("meta")
    assert host_weight(model).device.type == "cpu"
    assert model.device.type == "meta"  # where a pipeline would send its inputs
    rows = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    assert rows.device.type == "meta"
    assert rows.shape == (1, 3, 32)


def test_no_parameter_is_left_for_data_parallelism_to_see():
    model = untied()
    before = trainable_parameters(model)
    model.requires_grad_(False)
    keep_embedding_on_host(model)
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert trainable_parameters(model) == (0, before[1])


def test_the_state_dict_and_a_merged_model_still_have_it(tmp_path):
    model = with_lora(untied())
    expected = model.get_input_embeddings().weight.detach().clone()
    ids = torch.tensor([[5, 6, 7, 8]])
    keep_embedding_on_host(model)
    logits = model(ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, expected)
    # Merging rounds the sum of two products once more.
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_state_dict_is_loaded_into_it():
    model = untied()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    keep_embedding_on_host(model.requires_grad_(False))
    host_weight(model).zero_()
    model.load_state_dict(state)
    assert torch.equal(host_weight(model), state["model.embed_tokens.weight"])


def test_a_copy_of_the_model_looks_up_its_own_rows():
    model = untied().requires_grad_(False)
    keep_embedding_on_host(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    other = copy.deepcopy(model)
    host_weight(model).zero_()
    assert torch.equal(other(ids).logits, expected)


def test_it_can_be_asked_for_twice_and_generates(tmp_path):
    model = with_lora(untied())
    expected = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    trainer_for(model, tmp_path, offload_embedding=True)
    trainer_for(model, tmp_path, offload_embedding=True)
    found = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_lora(tiny_model(tie_word_embeddings=True)), "as the output head too"),
        (untied, "all weights train"),
        (lambda: with_lora(untied(), modules_to_save=["embed_tokens"]), "ModulesToSaveWrapper"),
        (lambda: with_lora(untied(), target_modules=["embed_tokens"]), "an adapter that trains it"),
    ],
)
def test_an_embedding_that_the_device_needs_is_refused_in_one_line(make, reason, tmp_path):
    with pytest.raises(ModelError, match=reason) as caught:
        trainer_for(make(), tmp_path, offload_embedding=True)
    assert "offload_embedding" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trained_embedding_is_refused():
    with pytest.raises(ModelError, match="the embedding trains"):
        keep_embedding_on_host(untied())


def test_an_embedding_that_looks_at_the_ids_themselves_is_refused_and_left_as_it_was(tmp_path):
    class WithoutFive(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * (ids != 5).unsqueeze(-1)

    model = with_lora(untied())
    model.get_input_embeddings().__class__ = WithoutFive
    expected = model(torch.tensor([[4, 5, 6]])).logits
    with pytest.raises(ModelError, match="WithoutFive does more with token ids than look rows up"):
        trainer_for(model, tmp_path, offload_embedding=True)
    assert torch.equal(model(torch.tensor([[4, 5, 6]])).logits, expected)
    assert host_weight(model) is None


def test_the_next_trainer_has_the_embedding_back(tmp_path):
    """After a merge all weights train, the embedding too."""
    model = with_lora(untied())
    trainer_for(model, tmp_path, offload_embedding=True)
    merged = model.merge_and_unload().requires_grad_(True)
    before = host_weight(merged).clone()
    names = {name for name, _ in untied().named_parameters()}
    trainer = trainer_for(merged, tmp_path, max_steps=1, learning_rate=0.1)
    trainer.train()
    assert host_weight(merged) is None
    assert {name for name, _ in merged.named_parameters()} == names
    assert not torch.equal(merged.get_input_embeddings().weight, before)
    with pytest.raises(ModelError, match="all weights train"):
        trainer_for(merged, tmp_path, offload_embedding=True)


def test_an_adapter_run_without_the_option_has_a_frozen_embedding_on_the_device(tmp_path):
    model = with_lora(untied())
    trainer_for(model, tmp_path, offload_embedding=True)
    trainer_for(model, tmp_path)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.nn.Parameter)
    assert not weight.requires_grad


def test_it_follows_the_model_into_another_dtype():
    model = with_lora(untied())
    keep_embedding_on_host(model)
    model.to(torch.bfloat16)
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
    dtypes = {value.dtype for value in model.state_dict().values()}
    assert dtypes == {torch.bfloat16}


def test_a_state_dict_that_does_not_fit_is_refused_as_before():
    model = untied().requires_grad_(False)
    keep_embedding_on_host(model)
    state = dict(model.state_dict())
    name = "model.embed_tokens.weight"
    with pytest.raises(RuntimeError, match="size mismatch for model.embed_tokens.weight"):
        model.load_state_dict({**state, name: torch.ones(1, 32)})
    del state[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [name]


def test_a_pickled_model_still_looks_up_its_rows(tmp_path):
    model = untied().requires_grad_(False)
    keep_embedding_on_host(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["offload_embedding", "activation_offloading"])
def test_sharded_models_are_refused(name, tmp_path, monkeypatch):
    trainer = trainer_for(with_lora(untied()), tmp_path, **{name: True})
    trainer.is_fsdp_enabled = True
    plugin = type("Plugin", (), {"fsdp_version": 2})
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ConfigError, match=f"{name} is not supported with FSDP"):
        check_parallelism(trainer)


# ---- what the backward pass needs ----


def test_on_a_cpu_activation_offloading_does_nothing(tmp_path):
    there = one_step(with_lora(untied()), tmp_path)
    asked = one_step(with_lora(untied()), tmp_path, activation_offloading=True)
    assert all(torch.equal(there[1][name], asked[1][name]) for name in there[1])


@pytest.fixture
def cpu_as_accelerator(monkeypatch):
    """TRL's manager at work on a CPU, without pinned memory and streams, which that has not."""
    activation_offloading = pytest.importorskip("trl.models.activation_offloading")
    own = activation_offloading.get_act_offloading_ctx_manager
    made = []

    def on_cpu(model, **settings):
        made.append(own(model, use_pin_memory=False, use_streams=False, **settings))
        return made[-1]

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(activation_offloading, "get_act_offloading_ctx_manager", on_cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(host_memory, "OFFLOADING_DEVICES", ("cpu",))
    return made


@pytest.mark.parametrize("checkpointing", [True, False])
def test_offloaded_activations_give_the_same_gradients(checkpointing, cpu_as_accelerator, tmp_path):
    settings = {"gradient_checkpointing": checkpointing, "max_tokens_per_row": 100}
    expected = one_step(with_lora(untied()), tmp_path, **settings)
    model = with_lora(untied())
    trainer = trainer_for(
        model, tmp_path, plain_rows(6), activation_offloading=True, **settings
    )  # fmt: skip
    (manager,) = cpu_as_accelerator
    moved = []
    own_pack = manager.pack_hook
    manager.pack_hook = lambda tensor: moved.append(tensor.nbytes) or own_pack(tensor)
    found = step_gradients(trainer, [list(trainer.train_dataset)])
    assert len(moved) > 2 * len(model.get_base_model().model.layers)  # in each of several rows
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])


def test_without_trl_it_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "OFFLOADING_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", None)
    with pytest.raises(ConfigError, match=r"activation_offloading needs TRL \(pip install trl\)"):
        offloaded_activations(untied(), quiet_config(tmp_path, activation_offloading=True))


def test_the_tokenizer_has_the_padding_id_that_is_used_here():
    assert len(TOKENIZER) > FAMILIES["qwen3"]["pad_token_id"]
