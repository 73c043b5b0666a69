"""A base model in 4 or 8 bits, on the CPU and for real: it trains, packs, its adapter is good."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import (
    TOKENIZER,
    plain_rows,
    quiet_config,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)

from lite_orpo.config.options import ModelOptions
from lite_orpo.errors import ConfigError, ModelError
from lite_orpo.model import quantization
from lite_orpo.model.load import load_model

CPU = torch.device("cpu")
bitsandbytes = pytest.importorskip("bitsandbytes")
# bitsandbytes and PEFT, of dtypes that they convert for themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model = tiny_model(hidden_size=128, intermediate_size=256, head_dim=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def load(folder, **options):
    settings = ModelOptions(model_name_or_path=str(folder), **options)
    return load_model(settings, CPU, trains_all_weights=False)


def adapted(model, **settings):
    """The model with the same adapter every time."""
    torch.manual_seed(0)
    return with_lora(model, **settings)


def linears_of(model):
    return {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"load_in_4bit": True}, "Linear4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "Linear4bit"),
        ({"load_in_8bit": True}, "Linear8bitLt"),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_linear_layers_are_quantised_and_nothing_else_is_copied_to_fp32(options, kind, folder):
    model = load(folder, dtype="bfloat16", **options)
    assert linears_of(model) == {kind}
    trainer = trainer_for(model, folder, peft_config=LoraConfig(target_modules="all-linear"))
    base = trainer.model.get_base_model()
    for layer in (base.get_input_embeddings(), base.get_output_embeddings(), base.model.norm):
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_double_quantisation_is_on_unless_turned_off(folder):
    for nested in (True, False):
        model = load(folder, load_in_4bit=True, use_bnb_nested_quant=nested)
        assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested is nested


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_packed_rows_make_the_gradients_of_separate_ones(bits, adapter, folder, tmp_path):
    if bits == "load_in_8bit" and adapter == "dora":
        with pytest.raises(ModelError, match="DoRA on an 8-bit base fails on CPUs"):
            trainer_for(adapted(load(folder, **{bits: True}), use_dora=True), tmp_path)
        return
    if bits == "load_in_8bit":
        # Its outlier columns are found over all rows of a product.
        tolerance = 0.05
    else:
        tolerance = 1e-5
    found = {}
    for sharing in ("auto", "off"):
        model = adapted(load(folder, **{bits: True}), **ADAPTERS[adapter])
        trainer = trainer_for(model, tmp_path, plain_rows(6), prefix_sharing=sharing)
        found[sharing] = step_gradients(trainer, [list(trainer.train_dataset)])
        if bits == "load_in_4bit" and sharing == "auto":
            assert trainer.sharing.is_on, trainer.sharing.reason
    assert found["auto"][0] == pytest.approx(found["off"][0], rel=tolerance)
    assert whole_relative_error(found["auto"][1], found["off"][1]) <= tolerance


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, folder, tmp_path):
    found = []
    for extra in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        trainer = trainer_for(
            adapted(load(folder, load_in_4bit=True)), tmp_path, max_steps=2, optim="sgd",
            learning_rate=0.05, **extra,
        )  # fmt: skip
        trainer.train()
        found.append({n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]


@pytest.fixture(scope="module")
def sixteen_bit_losses(folder, tmp_path_factory):
    return trained(load(folder), tmp_path_factory.mktemp("16"), "adamw_torch")[0]


def trained(model, folder, optim):
    torch.manual_seed(0)
    trainer = trainer_for(
        adapted(model),
        folder,
        plain_rows(16),
        optim=optim,
        max_steps=12,
        learning_rate=0.01,
        per_device_train_batch_size=16,
    )
    trainer.train()
    losses = [log["nll_loss"] for log in trainer.state.log_history if "nll_loss" in log]
    return losses, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")  # paged optimisers on a CPU
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_4_bit_run_learns_what_the_16_bit_run_does(optim, folder, sixteen_bit_losses, tmp_path):
    losses, _ = trained(load(folder, load_in_4bit=True), tmp_path, optim)
    fall = sixteen_bit_losses[0] - sixteen_bit_losses[-1]
    assert fall > 0.3
    # Rounding to 16 levels moves the start a little; what is learnt is nearly the same.
    assert losses[0] == pytest.approx(sixteen_bit_losses[0], rel=0.05)
    assert losses[0] - losses[-1] == pytest.approx(fall, rel=0.15)


def test_an_adapter_trained_on_a_4_bit_base_fits_the_16_bit_base(folder, tmp_path):
    _, trainer = trained(load(folder, load_in_4bit=True), tmp_path, "adamw_torch")
    trainer.save_model(str(tmp_path / "adapter"))
    merged = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    ids = torch.tensor([list(range(6, 40))])

    def logits(model):
        with torch.no_grad():
            return model.eval()(ids).logits

    on_4_bit, on_16_bit = logits(trainer.model), logits(merged)
    bases = logits(load(folder, load_in_4bit=True)), logits(load(folder))
    # As far from each other as the two bases are without it, and no further.
    assert (on_4_bit - on_16_bit).std() <= 1.5 * (bases[0] - bases[1]).std()
    assert (on_16_bit - bases[1]).std() > 2 * (on_4_bit - on_16_bit).std()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_a_model_that_was_evaluated_before_still_passes_gradients(nested, folder, tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks it then, into a format without a backward."""
    found = []
    for is_used_before in (False, True):
        model = load(folder, load_in_4bit=True, use_bnb_nested_quant=nested)
        if is_used_before:
            with torch.no_grad():
                model.eval()(torch.tensor([[7, 8, 9]]))
        trainer = trainer_for(adapted(model), tmp_path, plain_rows(4))
        found.append(step_gradients(trainer, [list(trainer.train_dataset)]))
        trainer.evaluate(plain_rows(2))
        again = step_gradients(trainer, [list(trainer.train_dataset)])
        assert whole_relative_error(again[1], found[-1][1]) == 0.0
    # Its scales went through bf16 (2^-9) where it was repacked.
    assert whole_relative_error(found[1][1], found[0][1]) <= 1e-2


def test_gradients_through_4_bit_layers_are_those_of_their_dequantised_weights(folder, tmp_path):
    model = load(folder, load_in_4bit=True)
    plain = load(folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            plain.get_submodule(name).weight.data = weight.float()
    found = []
    for each in (model, plain):
        trainer = trainer_for(adapted(each), tmp_path, plain_rows(4))
        found.append(step_gradients(trainer, [list(trainer.train_dataset)]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert whole_relative_error(found[0][1], found[1][1]) <= 1e-5


def test_a_checkpoint_that_is_quantised_already_loads_and_trains(folder, tmp_path):
    load(folder, load_in_4bit=True).save_pretrained(tmp_path / "4bit")
    model = load(tmp_path / "4bit")
    assert linears_of(model) == {"Linear4bit"}
    trainer = trainer_for(adapted(model), tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(ModelError, match="cannot train themselves; train an adapter"):
        trainer_for(load(tmp_path / "4bit"), tmp_path)


def test_4_bit_without_an_adapter_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ModelError) as caught:
        trainer_for(load(folder, load_in_4bit=True), tmp_path)
    assert "the base weights are quantised (bitsandbytes)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_weights_without_an_adapter_are_refused_before_anything_is_loaded(folder):
    options = ModelOptions(model_name_or_path=str(folder), load_in_4bit=True)
    with pytest.raises(ModelError, match="load_in_4bit: .* set use_peft: true"):
        load_model(options, CPU, trains_all_weights=True)


def test_a_checkpoint_that_is_quantised_in_another_way_is_refused(folder, tmp_path):
    load(folder, load_in_8bit=True).save_pretrained(tmp_path / "8bit")
    assert linears_of(load(tmp_path / "8bit", load_in_8bit=True)) == {"Linear8bitLt"}
    with pytest.raises(ModelError, match="quantised already, in another way .bitsandbytes."):
        load(tmp_path / "8bit", load_in_4bit=True)


def test_a_quantised_layer_cannot_be_trained_in_full_and_says_so(folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM with quantised weights"):
        trainer_for(load(folder, load_in_4bit=True), tmp_path, peft_config=config)


def test_a_quantised_head_keeps_full_logits(folder, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=[], bnb_4bit_quant_storage=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    if type(model.lm_head).__name__ != "Linear4bit":
        pytest.skip("this transformers never quantises a head")
    trainer = trainer_for(adapted(model), tmp_path)
    assert not trainer.head.is_fused


def test_4_bit_weights_are_counted_as_what_they_stand_for(folder):
    from lite_orpo.model.adapter import trainable_parameters

    full, quantised = load(folder), load(folder, load_in_4bit=True)
    assert trainable_parameters(quantised)[1] == trainable_parameters(full)[1]


def test_4_and_8_bits_at_once_are_refused(folder):
    with pytest.raises(ModelError, match="load_in_4bit and load_in_8bit are both set"):
        load(folder, load_in_4bit=True, load_in_8bit=True)


def test_a_data_type_that_is_not_known_is_refused(folder):
    with pytest.raises(ModelError, match="bnb_4bit_quant_type must be nf4 or fp4, found 'nf5'"):
        load(folder, load_in_4bit=True, bnb_4bit_quant_type="nf5")


def test_a_device_without_bitsandbytes_takes_the_16_bit_path_and_says_so(
    folder, monkeypatch, caplog
):
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with caplog.at_level(logging.WARNING):
        model = load(folder, load_in_4bit=True)
    assert linears_of(model) == {"Linear"}
    (line,) = [r.getMessage() for r in caplog.records if "load_in_4bit" in r.getMessage()]
    assert "bitsandbytes does not run on cpu; the model is loaded in float32 instead" in line


def test_without_bitsandbytes_an_8_bit_optimiser_is_refused_in_one_line(tmp_path, monkeypatch):
    from lite_orpo.config import orpo_config

    monkeypatch.setattr(orpo_config, "find_spec", lambda name: None)
    for optim in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_bnb_8bit"):
        with pytest.raises(ConfigError, match="needs bitsandbytes"):
            quiet_config(tmp_path, optim=optim)
    assert quiet_config(tmp_path, optim="adamw_torch")


def test_a_quantised_checkpoint_without_bitsandbytes_is_refused(folder, tmp_path, monkeypatch):
    load(folder, load_in_4bit=True).save_pretrained(tmp_path / "4bit")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="quantised by bitsandbytes, but bitsandbytes is not"):
        load(tmp_path / "4bit")
