"""A head that the seam does not know keeps the model's own full logits; it is never guessed at."""

import logging

import pytest
import torch
from test_head_architectures import attached, padded_batch, parts_of
from tiny_models import tiny_model, trainer_for, with_lora
from torch import nn

from lite_orpo.errors import ModelError
from lite_orpo.model.adapter import adapter_switched_off


def change_logits(model, change):
    """A model of the same class whose forward changes its logits before it returns them."""

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    return model


def add_mask(logits):
    mask = torch.zeros(logits.shape[-1])
    mask[100:] = float("-inf")
    return logits + mask


CHANGES = {
    "scaled": lambda z: z * 0.5,
    "scaled_by_a_thousandth": lambda z: z * 1.001,
    "soft_capped": lambda z: 30.0 * torch.tanh(z / 30.0),
    "softly_soft_capped": lambda z: 300.0 * torch.tanh(z / 300.0),
    "clamped": lambda z: z.clamp(-20.0, 20.0),
    "shifted_by_token": lambda z: z + torch.linspace(0, 1, z.shape[-1]),
    "masked_vocabulary": add_mask,
    "normalised": lambda z: z - z.mean(dim=-1, keepdim=True),
    "reversed": lambda z: z.flip(-1),
    "padded_vocabulary": lambda z: nn.functional.pad(z, (0, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_an_unknown_change_of_the_logits_is_seen_and_obeyed(change, caplog):
    model = change_logits(tiny_model("llama"), change)
    with caplog.at_level(logging.WARNING, logger="lite_orpo"):
        head = attached(model)
    assert not head.is_fused
    assert "changed in a way that is not known" in head.reason
    (record,) = caplog.records
    assert head.reason in record.getMessage()
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [lambda z: z * 1.05, lambda z: 100 * torch.tanh(z / 100)])
@torch.no_grad()
def test_a_change_of_a_twentieth_is_seen_in_bf16_too(change):
    model = change_logits(tiny_model("llama", dtype=torch.bfloat16), change)
    assert not attached(model).is_fused


def lying_gemma2():
    # What the forward truly does stays, what the configuration says is gone.
    model = tiny_model("gemma2", final_logit_softcapping=None)
    return change_logits(model, lambda z: 2.0 * torch.tanh(z / 2.0))


def lying_cohere():
    model = tiny_model("cohere")
    model.config.logit_scale = 0.26  # the model keeps 0.25 from its construction
    return model


def lying_granite():
    model = tiny_model("granite", logits_scaling=1.0)
    return change_logits(model, lambda z: z / 3.0)


@pytest.mark.parametrize("make", [lying_gemma2, lying_cohere, lying_granite])
@torch.no_grad()
def test_a_configuration_that_says_something_else_is_not_believed(make):
    model = make()
    assert not attached(model).is_fused
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_layer_between_backbone_and_head_is_seen():
    base = tiny_model("llama")

    class WithExtraLayer(type(base)):
        def forward(self, *args, use_cache=None, **kwargs):
            output = self.model(*args, use_cache=False, **kwargs)
            logits = self.lm_head(self.extra(output.last_hidden_state))
            return type("Output", (), {"logits": logits})()

    base.extra = nn.Linear(32, 32)
    base.__class__ = WithExtraLayer
    head = attached(base)
    assert not head.is_fused
    assert "does not get the backbone's output" in head.reason
    found, expected = parts_of(base)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_of_two_products_is_seen():
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, model.config.vocab_size))
    head = attached(model)
    assert not head.is_fused
    assert "no plain linear layer" in head.reason
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_training_mode_is_as_it_was_after_the_check():
    for training in (True, False):
        model = tiny_model("llama")
        head = attached(model)
        model.train(training)
        head.verify()
        assert model.training is training


# ---- adapters on the head itself ----


VARIANTS = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_more_than_a_plain_lora_on_the_head_takes_the_full_logits_and_is_right(variant, caplog):
    model = with_lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"], **variant)
    with caplog.at_level(logging.WARNING, logger="lite_orpo"):
        head = attached(model)
    assert not head.is_fused
    assert any(head.reason in record.getMessage() for record in caplog.records)
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    found.mean().backward()
    for name in ("lora_A", "lora_B"):
        assert getattr(model.base_model.model.lm_head, name).default.weight.grad.any()


def with_lora_on_the_head(name="llama", **options):
    return with_lora(tiny_model(name), target_modules=["q_proj", "lm_head"], **options)


def gradients_of(value, model):
    model.zero_grad()
    value.mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["lora", "rs"])
def test_lora_on_the_head_is_fused_and_gets_its_gradients(name, options):
    # A tied head too: PEFT leaves the shared weight alone.
    model = with_lora_on_the_head(name, **options)
    assert attached(model).is_fused
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    ours, theirs = gradients_of(found, model), gradients_of(expected, model)
    assert ours.keys() == theirs.keys()
    assert {"lora_A", "lora_B"} <= {part for k in ours if "lm_head" in k for part in k.split(".")}
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-6, msg=key)
    # Without the adapter the log-probabilities are others: it was not left out on both sides.
    batch, score_rows = padded_batch(model.config.vocab_size)
    with torch.no_grad(), adapter_switched_off(model):
        assert (model(**batch, score_rows=score_rows) - found).abs().max() > 0.01


@torch.no_grad()
def test_two_adapters_on_the_head_both_count():
    model = with_lora_on_the_head()
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.copy_(torch.linspace(-0.3, 0.2, parameter.numel()).view_as(parameter))
    model.base_model.set_adapter(["default", "second"])
    assert attached(model).is_fused
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_merged_adapter_on_the_head_counts_once():
    model = with_lora_on_the_head()
    attached(model)
    before, _ = parts_of(model)
    model.merge_adapter()
    merged, expected = parts_of(model)
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_that_changed_its_kind_is_one_line():
    model = with_lora_on_the_head()
    attached(model)
    model.base_model.model.lm_head = nn.Sequential(model.base_model.model.lm_head)
    batch, score_rows = padded_batch(model.config.vocab_size)
    with pytest.raises(ModelError, match="make a new trainer"):
        model(**batch, score_rows=score_rows)


def with_trained_head():
    model = with_lora(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        saved.weight.add_(torch.linspace(-1.0, 1.0, saved.weight.numel()).view_as(saved.weight))
    return model, saved


def test_a_head_that_is_trained_beside_the_adapter_is_fused_and_gets_its_gradient():
    model, saved = with_trained_head()
    assert attached(model).is_fused
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    found.mean().backward()
    ours = saved.weight.grad.clone()
    model.zero_grad()
    expected.mean().backward()
    torch.testing.assert_close(ours, saved.weight.grad, rtol=1e-4, atol=1e-7)
    assert model.base_model.model.lm_head.original_module.weight.grad is None


@torch.no_grad()
def test_switching_the_adapter_off_gives_the_base_models_logps():
    for make in (with_lora, lambda _: with_trained_head()[0]):
        base = tiny_model("llama").eval()
        model = make(tiny_model("llama"))
        attached(model)
        batch, score_rows = padded_batch(base.config.vocab_size)
        adapted = model(**batch, score_rows=score_rows)
        with adapter_switched_off(model):
            off = model(**batch, score_rows=score_rows)
        base_logps = parts_of_base(base, batch, score_rows)
        torch.testing.assert_close(off.double(), base_logps, rtol=0, atol=1e-5)
        assert (adapted - off).abs().max() > 0.01
        assert torch.equal(model(**batch, score_rows=score_rows), adapted)


def parts_of_base(base, batch, score_rows):
    index, targets = score_rows
    logits = base(**batch).logits.flatten(0, 1)[index].double()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def test_a_lora_on_the_head_moves_in_training(tmp_path):
    model = with_lora_on_the_head()
    up = model.base_model.model.lm_head.lora_B["default"].weight
    before = up.detach().clone()
    trainer = trainer_for(model, tmp_path, max_steps=1, learning_rate=0.01)
    assert trainer.head.is_fused
    trainer.train()
    assert not torch.equal(up, before)


def test_a_trained_head_moves_in_training_and_the_original_stays(tmp_path):
    model, saved = with_trained_head()
    original = model.base_model.model.lm_head.original_module.weight
    before, original_before = saved.weight.detach().clone(), original.detach().clone()
    trainer_for(model, tmp_path, max_steps=1, learning_rate=0.01).train()
    assert not torch.equal(saved.weight, before)
    assert torch.equal(original, original_before)


def dora_on_the_head():
    return with_lora(tiny_model(), target_modules=["lm_head"], use_dora=True)


@pytest.mark.parametrize("make", [lying_gemma2, dora_on_the_head])
def test_a_model_on_the_full_logits_way_trains(make, tmp_path):
    trainer = trainer_for(make(), tmp_path, max_steps=2, learning_rate=0.01)
    assert not trainer.head.is_fused
    trainer.train()
    first, second = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert second < first
