"""What holds during a step: no casts that autocast undoes, and the same numbers bit for bit."""

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import GradientRecorder, plain_rows, tiny_model, trainer_for, with_lora

from lite_orpo.step import context as step_context

BF16 = {"bf16": True, "prefix_sharing": "on"}


def adapted(**lora):
    return with_lora(tiny_model(dtype=torch.bfloat16), **lora)


def step(model, folder, **settings):
    """Gradients of one step of a training, and the bytes that were kept for its backward pass."""
    recorder = GradientRecorder()
    trainer = trainer_for(
        model, folder, plain_rows(6), callbacks=[recorder],
        **{**BF16, "max_steps": 1, "per_device_train_batch_size": 6, **settings},
    )  # fmt: skip
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train()
    return recorder.steps[0], sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_the_casts_gradients_are_bitwise_the_same(checkpointing, tmp_path, monkeypatch):
    settings = {"gradient_checkpointing": checkpointing}
    spared = step(adapted(), tmp_path, **settings)
    monkeypatch.setattr(step_context, "no_needless_casts", lambda model, is_autocast: nullcontext())
    cast = step(adapted(), tmp_path, **settings)
    assert all(torch.equal(spared[0][name], cast[0][name]) for name in cast[0])


def test_a_layers_input_is_kept_once_and_not_once_an_adapter(tmp_path, monkeypatch):
    spared = step(adapted(), tmp_path)[1]
    monkeypatch.setattr(step_context, "no_needless_casts", lambda model, is_autocast: nullcontext())
    cast = step(adapted(), tmp_path)[1]
    assert spared < 0.9 * cast  # of a model of 32 channels; the rest is weights and masks


def test_between_steps_the_model_is_as_it_was(tmp_path):
    model = adapted()
    step(model, tmp_path)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    assert all(layer.cast_input_dtype_enabled for layer in layers)
    # Without autocast it needs the casts: fp32 adapters on a bf16 model.
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize(
    ("lora", "settings"), [({"use_dora": True}, {}), ({}, {"bf16": False})], ids=["DoRA", "fp32"]
)
def test_where_the_input_is_used_in_fp32_it_is_cast(lora, settings, tmp_path, monkeypatch):
    model = adapted(**lora)
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer.register_forward_hook(
        lambda module, inputs, output: seen.append(module.cast_input_dtype_enabled)
    )
    step(model, tmp_path, **settings)
    assert seen
    assert all(seen)
