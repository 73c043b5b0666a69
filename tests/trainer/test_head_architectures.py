"""The head seam on twelve families: fused, and equal to the model's own log-probabilities."""

import copy
import inspect

import pytest
import torch
from tiny_models import ARCHITECTURES, relative_error, tiny_model, with_lora

import lite_orpo.model.head as head_module
from lite_orpo.model.head import attach_scored_head

ALL = pytest.mark.parametrize("name", ARCHITECTURES)
WRAPPED = pytest.mark.parametrize("wrap", [lambda m: m, with_lora], ids=["plain", "lora"])


def attached(model):
    head = attach_scored_head(model.eval(), backend="auto", workspace_bytes=2**20, device="cpu")
    head.verify()
    return head


def padded_batch(vocabulary: int, seed: int = 3):
    """Two right-padded rows, and every position whose next token is no padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(6, vocabulary, (2, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 17:] = 0
    input_ids[1, 17:] = 0
    is_scored = torch.zeros_like(input_ids, dtype=torch.bool)
    is_scored[:, :-1] = attention_mask[:, 1:] == 1
    index = is_scored.view(-1).nonzero().squeeze(1)
    targets = input_ids.roll(-1, dims=1).view(-1)[index]
    return {"input_ids": input_ids, "attention_mask": attention_mask}, (index, targets)


def own_logps(model, batch, score_rows):
    index, targets = score_rows
    logits = model(**batch, use_cache=False).logits.flatten(0, 1)[index]
    return torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None]).squeeze(1)


def parts_of(model):
    batch, score_rows = padded_batch(model.config.vocab_size)
    return model(**batch, score_rows=score_rows), own_logps(model, batch, score_rows)


@pytest.fixture
def fused_calls(monkeypatch):
    """Keyword arguments of every call of the fused op."""
    calls = []
    fused = head_module.fused_linear_logprobs

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return fused(*args, **kwargs)

    monkeypatch.setattr(head_module, "fused_linear_logprobs", counted)
    return calls


# PEFT adapts Mixtral's fused experts through patterns of its own, and warns of them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@ALL
@WRAPPED
@torch.no_grad()
def test_logps_are_fused_and_equal_the_models_own(name, wrap, fused_calls):
    model = wrap(tiny_model(name))
    head = attached(model)
    assert head.is_fused, head.reason
    found, expected = parts_of(model)
    assert len(fused_calls) == 1
    assert found.dtype == torch.float32
    # Logits of some ten nats in fp32: a few roundings of 1e-6.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    # Far from uniform, so that a wrong scale or cap could not hide.
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("gemma2", (1.0, 2.0)),
        ("gemma3_text", (1.0, 3.0)),
        ("cohere", (0.25, None)),
        ("granite", (1 / 3.0, None)),
        ("llama", (1.0, None)),
    ],
)
@torch.no_grad()
def test_the_transform_is_the_familys_and_leaving_it_out_would_show(name, transform):
    model = tiny_model(name)
    head = attached(model)
    assert head.transform == pytest.approx(transform)
    if transform == (1.0, None):
        return
    head.transform = head_module.HeadTransform(1.0, None)
    found, expected = parts_of(model)
    assert (found - expected).abs().max() > 0.1


@ALL
@torch.no_grad()
def test_bf16_models_pass_the_check_and_their_logps_are_at_least_as_good(name):
    model = tiny_model(name, dtype=torch.bfloat16)
    head = attached(model)
    assert head.is_fused, head.reason
    found, expected = parts_of(model)
    # The model rounds logits of up to 2^4 nats to 2^-4 (8 bits); ours are not rounded at all.
    assert (found - expected).abs().max() < 0.15


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_gradients_of_all_parameters_equal_those_through_the_models_own_logits(name, tied):
    gradients = []
    for own in (False, True):
        model = tiny_model(name, tie_word_embeddings=tied)
        attached(model)
        batch, score_rows = padded_batch(model.config.vocab_size)
        score = own_logps if own else lambda m, b, rows: m(**b, score_rows=rows)
        score(model, batch, score_rows).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    # fp32 sums in another order.
    assert relative_error(*gradients) <= 1e-5


@torch.no_grad()
def test_a_head_with_a_bias_is_fused(fused_calls):
    model = tiny_model("phi")
    assert model.lm_head.bias is not None
    assert model.lm_head.bias.abs().max() > 0.1
    assert attached(model).is_fused
    found, expected = parts_of(model)
    assert fused_calls[0]["bias"] is model.lm_head.bias
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpt_neox", {}), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32})],
)
@torch.no_grad()
def test_other_families_give_the_right_values_whichever_way_they_take(name, settings):
    model = tiny_model(name, **settings)
    attached(model)
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_models_own_forward_and_generation_are_left_as_they_were():
    plain, model = tiny_model("gemma2").eval(), tiny_model("gemma2")
    head = attached(model)
    batch, _ = padded_batch(plain.config.vocab_size)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    prompt = {key: value[:1, :5] for key, value in batch.items()}
    assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))
    head.detach()
    assert "forward" not in model.__dict__
    assert "_lite_orpo_head" not in model.__dict__


@torch.no_grad()
def test_attaching_twice_leaves_one_head():
    model = tiny_model("llama")
    first, second = attached(model), attached(model)
    assert model._lite_orpo_head is second
    assert second._own_forward == first._own_forward
    found, expected = parts_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_deep_copy_runs_its_own_weights():
    for wrap in (lambda model: model, with_lora):
        model = wrap(tiny_model("llama"))
        attached(model)
        before = parts_of(model)[0]
        twin = copy.deepcopy(model)
        assert torch.equal(parts_of(twin)[0], before)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        found, expected = parts_of(twin)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
        assert (found - before).abs().max() > 0.1
        assert torch.equal(parts_of(model)[0], before)


def test_the_forwards_signature_is_the_models_own():
    # transformers and PEFT read from it what a model accepts.
    plain, model = tiny_model("llama"), tiny_model("llama")
    attached(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
