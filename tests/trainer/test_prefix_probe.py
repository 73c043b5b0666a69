"""Which models may train on packed rows: the static rule, and the probe on every family."""

import pytest
import torch
from tiny_models import (
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)
from tree_families import EXACT, REFUSED, decide, exact_model, longer_rows, refused_model

from lite_orpo.model import prefix_sharing
from lite_orpo.model.tree_attention import TREE_SDPA

# PEFT, of experts that "all-linear" does not reach.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_probe_accepts(family, dtype):
    sharing = decide(with_lora(exact_model(family, dtype=dtype)))
    assert sharing.is_on, sharing.reason
    assert sharing.attention == TREE_SDPA


@pytest.mark.parametrize("family", EXACT)
def test_packed_rows_make_the_loss_and_gradients_of_separate_ones(family, tmp_path):
    found = {}
    for sharing in ("on", "off"):
        trainer = trainer_for(
            with_lora(exact_model(family)), tmp_path, longer_rows(6), prefix_sharing=sharing
        )
        found[sharing] = step_gradients(trainer, [list(trainer.train_dataset)])
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-6)
    # fp32, SDPA against the model's eager attention: mixtures of experts and gemma3n (which
    # divides by norms) round most.
    assert whole_relative_error(found["on"][1], found["off"][1]) <= 5e-6


@pytest.mark.parametrize("family", REFUSED)
def test_the_static_rule_refuses(family):
    reason = REFUSED[family][2]
    sharing = decide(refused_model(family))
    assert not sharing.is_on
    assert reason in sharing.reason


@pytest.mark.parametrize("family", REFUSED)
def test_the_probe_alone_refuses_too(family, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_static_reasons", lambda *_: iter(()))
    sharing = decide(refused_model(family))
    assert not sharing.is_on
    assert REFUSED[family][3] in sharing.reason


def attend_without_the_window(module, query, key, value, mask, **kwargs):
    from lite_orpo.model.tree_attention import tree_sdpa_attention

    return tree_sdpa_attention(
        module, query, key, value, mask, **{**kwargs, "sliding_window": None}
    )


def attend_across_branches(module, query, key, value, mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kwargs.pop("tree_spans")
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


@pytest.mark.parametrize(
    ("family", "dtype", "broken", "reason"),
    [
        ("mistral window", torch.float32, attend_without_the_window, "differ by"),
        ("llama", torch.float32, attend_across_branches, "see the chosen ones"),
        ("llama", torch.bfloat16, attend_across_branches, "see the chosen ones"),
    ],
)
def test_the_probe_sees_broken_attention(family, dtype, broken, reason, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def register():
        ALL_ATTENTION_FUNCTIONS.register(TREE_SDPA, broken)

    monkeypatch.setattr(prefix_sharing, "register_tree_attention", register)
    sharing = decide(exact_model(family, dtype=dtype))
    assert not sharing.is_on
    assert reason in sharing.reason


def test_a_window_that_is_not_told_is_seen_though_the_probes_rows_are_shorter():
    model = tiny_model("mistral", sliding_window=200)
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = _forgets_its_window(forward, layer.self_attn)
    sharing = decide(model)
    assert not sharing.is_on
    assert "sliding window" in sharing.reason


def _forgets_its_window(forward, attention):
    def forgetful(*args, **kwargs):
        window, attention.config.sliding_window = attention.config.sliding_window, None
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config.sliding_window = window

    return forgetful


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_counts_positions_along_the_row_is_refused(dtype):
    model = tiny_model(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # small enough for the difference to drown in bf16's rounding
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1]).unsqueeze(0))
    sharing = decide(model)
    assert not sharing.is_on
    assert sharing.reason == "it does not read position_ids"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_that_is_not_causal_is_refused(dtype):
    model = tiny_model(dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    sharing = decide(model)
    assert not sharing.is_on
    assert "not causal" in sharing.reason


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_that_round_by_how_many_tokens_they_get_are_no_leak(family):
    settings = {"hidden_size": 256, "num_hidden_layers": 3, "num_experts": 32}
    settings |= {"num_local_experts": 8, "num_experts_per_tok": 4}
    model = exact_model(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # for the width; logits of some nats
    sharing = decide(model)
    assert sharing.is_on, sharing.reason


def test_an_adapter_that_begins_at_a_token_of_the_row_is_refused():
    sharing = decide(with_lora(tiny_model(), alora_invocation_tokens=[7]))
    assert not sharing.is_on
    assert "aLoRA" in sharing.reason


def test_an_adapter_of_a_kind_that_is_not_known_is_refused():
    model = with_lora(tiny_model())
    model.peft_config["default"].peft_type = "XLORA"
    assert "adapter of type XLORA" in decide(model).reason


def test_a_window_in_the_configuration_of_a_model_that_has_none_does_not_matter():
    sharing = decide(tiny_model("llama", sliding_window=8))
    assert sharing.is_on, sharing.reason


def test_more_embeddings_than_outputs_do_not_stop_the_probe():
    model = tiny_model(tie_word_embeddings=False)
    old = model.get_input_embeddings()
    new = torch.nn.Embedding(old.num_embeddings + 5, old.embedding_dim)
    new.weight.data[: old.num_embeddings] = old.weight.data
    model.set_input_embeddings(new)
    assert decide(model).is_on


@pytest.mark.parametrize(("max_length", "is_on"), [(64, True), (65, False), (None, False)])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_longest_sequence_is_refused_beyond_its_limit(
    kind, max_length, is_on
):
    parameters = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model("llama", rope_parameters=parameters)
    sharing = decide(model, max_length=max_length)
    assert sharing.is_on == is_on, sharing.reason
    assert is_on or kind in sharing.reason


def test_the_probe_leaves_the_model_as_it_was():
    model = with_lora(tiny_model()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model.config._attn_implementation
    state = torch.random.get_rng_state()
    decide(model)
    assert model.training
    assert model.config._attn_implementation == own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
