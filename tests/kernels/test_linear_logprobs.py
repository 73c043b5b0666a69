"""Values and gradients of `fused_linear_logprobs`: against the reference in fp64, in half
precision against eager's own error, and where the model is sure of a token."""

import pytest
import torch
from cases import (
    TRANSFORMS,
    as_fp64,
    assert_same,
    eager,
    make_case,
    memorised,
    outcome,
    relative_error,
)

from lite_orpo_kernels import chunked, fused_linear_logprobs
from lite_orpo_kernels.reference import linear_logprobs_reference

# fp64 against fp64: summation order is all that differs.
FP64 = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_reference_is_log_softmax_in_fp64(transform):
    case = make_case(7, 5, 127, transform)
    assert_same(outcome(linear_logprobs_reference, case), outcome(eager, case), **FP64)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1000], ids="V{}".format)
@pytest.mark.parametrize("width", [1, 5, 123], ids="D{}".format)
@pytest.mark.parametrize("rows", [1, 7, 252], ids="M{}".format)
def test_odd_sizes_match_the_reference(rows, width, vocabulary, trainable):
    case = make_case(rows, width, vocabulary, "all", trainable=trainable)
    expected = outcome(eager, case)
    assert_same(outcome(linear_logprobs_reference, case), expected, **FP64)
    assert_same(outcome(fused_linear_logprobs, case, backend="chunked"), expected, **FP64)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("workspace_bytes", [64 * 2**20, 64_000, 1], ids="{}B".format)
def test_any_workspace_and_transform_match_the_reference(workspace_bytes, transform, trainable):
    # 1 block; 2 blocks without a soft-cap; 16 blocks (test_linear_logprobs_cost.py counts them).
    case = make_case(15, 12, 1000, transform, trainable=trainable)
    found = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=workspace_bytes)
    assert_same(found, outcome(linear_logprobs_reference, case), **FP64)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17], ids="V{}".format)
def test_blocks_of_one_column_match_the_reference(monkeypatch, vocabulary, transform, trainable):
    # A row whose first block is its own target has no maximum yet.
    monkeypatch.setattr(chunked, "MIN_BLOCK_COLUMNS", 1)
    case = make_case(40, 6, vocabulary, transform, trainable=trainable)
    found = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=1)
    assert_same(found, outcome(linear_logprobs_reference, case), **FP64)


@pytest.mark.parametrize("descending", [False, True], ids=["rising", "falling"])
def test_block_order_of_the_maximum_does_not_matter(monkeypatch, descending):
    # The maximum moves in every block, or never after the first: both ways of rescaling.
    monkeypatch.setattr(chunked, "MIN_BLOCK_COLUMNS", 1)
    case = make_case(9, 1, 30, trainable=False)
    order = case.weight.argsort(dim=0, descending=descending).squeeze(1)
    case = case._replace(
        hidden=(case.hidden.detach().abs() * 20).requires_grad_(), weight=case.weight[order]
    )
    found = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=1)
    assert_same(found, outcome(linear_logprobs_reference, case), **FP64)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradcheck(monkeypatch, transform, trainable):
    monkeypatch.setattr(chunked, "MIN_BLOCK_COLUMNS", 4)
    case = make_case(5, 3, 11, transform, trainable=trainable)
    options = {k: v for k, v in case.options.items() if k != "bias"}

    def logps(hidden, weight, bias=None):
        return fused_linear_logprobs(
            hidden, weight, case.targets, bias=bias, backend="chunked", workspace_bytes=1, **options
        )

    inputs = (case.hidden, case.weight, case.options.get("bias"))
    assert torch.autograd.gradcheck(logps, tuple(t for t in inputs if t is not None))


def test_differentiating_twice_is_refused():
    case = make_case(3, 4, 10, trainable=False)
    logps = fused_linear_logprobs(case.hidden, case.weight, case.targets, backend="chunked")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(logps.square().sum(), case.hidden, create_graph=True)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("shape", [(7, 5, 127), (63, 123, 1000)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "floor"),
    [
        # A sum of V terms, in any order, is good to a few fp32 roundings of 6e-8.
        pytest.param(torch.float32, 1e-6, id="fp32"),
        # Half a unit when the direction is stored and half a unit when the gradient is.
        pytest.param(torch.bfloat16, 2**-8, id="bf16"),
        pytest.param(torch.float16, 2**-11, id="fp16"),
    ],
)
def test_error_is_no_worse_than_eager(dtype, floor, shape, transform, trainable):
    case = make_case(*shape, transform, dtype, trainable=trainable)
    exact = outcome(linear_logprobs_reference, as_fp64(case))
    theirs = outcome(eager, case)
    ours = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=1)
    assert ours["logps"].dtype == torch.float32
    for name, value in exact.items():
        if name != "logps":
            assert ours[name].dtype == dtype
        limit = 2 * relative_error(theirs[name], value) + floor
        assert relative_error(ours[name], value) <= limit, name


@pytest.mark.parametrize("multiplies_bf16", [False, True], ids=["old-cpu", "bf16-cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_half_precision_on_the_cpu_rounds_next_to_nothing_but_results(
    monkeypatch, dtype, trainable, multiplies_bf16
):
    # Products and sums are fp32 there, but for e @ W where the CPU has bf16 products.
    monkeypatch.setattr(chunked, "_cpu_multiplies_bf16", lambda: multiplies_bf16)
    # A flat softmax over 125 blocks: each adds so little that
    # a sum in half precision would lose it.
    monkeypatch.setattr(chunked, "MIN_BLOCK_COLUMNS", 8)
    case = make_case(15, 64, 1000, dtype=dtype, trainable=trainable)
    case = case._replace(hidden=(case.hidden.detach() * 0.05).requires_grad_())
    exact = outcome(linear_logprobs_reference, as_fp64(case))
    found = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=1)
    assert relative_error(found.pop("logps"), exact["logps"]) <= 1e-6
    # Half a unit for the gradient, and half a unit before that for a frozen head's direction;
    # the same again for e and for each block's product, if they are rounded.
    half_a_unit = torch.finfo(dtype).eps / 2
    roundings = 1 if trainable else 4 if multiplies_bf16 and dtype == torch.bfloat16 else 2
    for name, value in found.items():
        assert relative_error(value, exact[name]) <= half_a_unit * roundings, name


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("margin", [-15, -19, -21, -25, -40, -60, -800])
def test_unlikely_token_is_exact_in_fp64(margin, backend):
    # -log p of a token far below the rest is d + exp(-d): not d from some threshold on.
    hidden, weight, targets = memorised(margin, dtype=torch.float64)
    logps = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(logps, eager(hidden, weight, targets), rtol=1e-14, atol=0)


@pytest.mark.parametrize("workspace_bytes", [2**20, 1], ids=["one-block", "blocks"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("margin", [0, 5, 15, 17, 20, 30, 60, 80, 100])
def test_memorised_token_keeps_its_relative_accuracy(monkeypatch, margin, backend, workspace_bytes):
    monkeypatch.setattr(chunked, "MIN_BLOCK_COLUMNS", 8)
    hidden, weight, targets = memorised(margin)
    logps = fused_linear_logprobs(
        hidden, weight, targets, backend=backend, workspace_bytes=workspace_bytes
    )
    exact = linear_logprobs_reference(hidden.double(), weight.double(), targets)
    # d near -100 is rounded to 4e-6 and nll = exp(d) inherits that; from d = -87 on fp32 is
    # subnormal and an absolute step of 1.4e-45 is all there is.
    torch.testing.assert_close(logps.double(), exact.detach(), rtol=1e-5, atol=1.5e-45)
    assert (logps < 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="fp32"),  # d near -60 is rounded to 2e-6
        # Two roundings of half a unit each.
        pytest.param(torch.bfloat16, 2**-8, id="bf16"),
        pytest.param(torch.float16, 2**-11, id="fp16"),
    ],
)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("margin", [1, 10, 20, 40, 60])
def test_memorised_token_keeps_its_gradient(margin, trainable, dtype, tolerance):
    # ORPO sends about 1 / q back to such a token: what returns is of order 1 in any dtype.
    hidden, weight, targets = memorised(margin, dtype=dtype)
    weight.requires_grad_(trainable)
    logps = fused_linear_logprobs(hidden, weight, targets, backend="chunked")
    grad_logps = -1 / torch.expm1(logps.detach())
    (found,) = torch.autograd.grad(logps, hidden, grad_logps)
    wide = hidden.detach().double().requires_grad_()
    logps = linear_logprobs_reference(wide, weight.detach().double(), targets)
    (exact,) = torch.autograd.grad(logps, wide, grad_logps.double())
    assert found.abs().amax() > 0.5
    assert relative_error(found, exact) <= tolerance


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_stay_finite(size, dtype, backend):
    generator = torch.Generator().manual_seed(3)
    logits = (size * (2 * torch.rand(20, 130, generator=generator) - 1)).to(dtype)
    targets = torch.randint(130, (20,), generator=generator)
    targets[0] = logits[0].argmax()
    hidden = logits.requires_grad_()
    weight = torch.eye(130, dtype=dtype)
    logps = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    exact = eager(hidden.detach().double(), weight.double(), targets)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    # A difference of two logits of this size, each rounded to fp32.
    torch.testing.assert_close(logps.detach().double(), exact, rtol=1e-5, atol=size * 1e-7)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_nan_stays_in_its_row_and_is_never_hidden(trainable):
    case = make_case(7, 5, 200, dtype=torch.float32, trainable=trainable)
    clean = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=1)
    hidden = case.hidden.detach().clone()
    hidden[3, 2] = float("nan")
    broken = case._replace(hidden=hidden.requires_grad_())
    found = outcome(fused_linear_logprobs, broken, backend="chunked", workspace_bytes=1)
    others = torch.tensor([0, 1, 2, 4, 5, 6])
    for name in ("logps", "hidden"):
        assert found[name][3].isnan().all()
        torch.testing.assert_close(found[name][others], clean[name][others], rtol=1e-6, atol=1e-7)


def test_a_vocabulary_entry_masked_by_its_bias_is_left_out():
    case = make_case(8, 5, 200, "bias", trainable=False)
    mask = torch.zeros(200, dtype=torch.bool)
    mask[:64] = True  # the whole first block
    targets = case.targets.clamp_min(64)
    bias = case.options["bias"].masked_fill(mask, float("-inf"))
    masked = case._replace(targets=targets, options={"bias": bias})
    kept = case._replace(targets=targets - 64, weight=case.weight[64:], options={"bias": bias[64:]})
    found = outcome(fused_linear_logprobs, masked, backend="chunked", workspace_bytes=1)
    assert_same(found, outcome(linear_logprobs_reference, kept), **FP64)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_only_entry_not_masked_by_its_bias_is_certain(trainable):
    case = make_case(4, 5, 200, "bias", trainable=trainable)
    bias = torch.full((200,), float("-inf"), dtype=torch.float64)
    bias[150] = 0
    only = case._replace(
        targets=torch.full((4,), 150), options={"bias": bias.requires_grad_(trainable)}
    )
    for name, value in outcome(
        fused_linear_logprobs, only, backend="chunked", workspace_bytes=1
    ).items():
        assert (value == 0).all(), name
