"""The Triton kernels of the head: on a GPU compiled, elsewhere in Triton's interpreter (the
kernels themselves, no stand-in), against the reference in fp64."""

import pytest
import torch
from cases import (
    DEVICE,
    TRANSFORMS,
    as_fp64,
    eager,
    make_case,
    memorised,
    outcome,
    relative_error,
)

from lite_orpo_kernels import fused_head_gradients, fused_linear_logprobs, fused_logprobs
from lite_orpo_kernels.head import Head, HeadTransform
from lite_orpo_kernels.reference import linear_logprobs_reference

# The logarithm of an empty sum is -inf on purpose; numpy, under the interpreter, mentions it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

# The rule: an error of at most twice eager's in the same dtype, plus a floor.
FLOORS = {
    # A sum of V terms, in any order, is good to a few fp32 roundings of 6e-8.
    torch.float32: 2e-6,
    # e and the direction are stored in half precision, and so is the gradient. On a GPU each is
    # rounded by half a unit; the interpreter cuts bf16 off, by up to one unit.
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, id="fp16"),
    ],
)
TRAINABLE = pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
FROZEN = {"trainable": False}


def fused(*args, **kwargs):
    return fused_linear_logprobs(*args, backend="triton", **kwargs)


def compare_with_eager(case, dtype, **options):
    """Raise AssertionError where the kernels are less exact than the rule allows."""
    exact = outcome(linear_logprobs_reference, as_fp64(case))
    theirs = outcome(eager, case)
    ours = outcome(fused, case, **options)
    assert ours["logps"].dtype == torch.float32
    for name, value in exact.items():
        limit = 2 * relative_error(theirs[name], value) + FLOORS[dtype]
        assert relative_error(ours[name], value) <= limit, name


def case_on_device(*args, **kwargs):
    return make_case(*args, device=DEVICE, **kwargs)


@TRAINABLE
@DTYPES
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(7, 5, 127), (140, 123, 1000)], ids=str)
def test_error_is_no_worse_than_eager(shape, transform, dtype, trainable):
    case = case_on_device(*shape, transform, dtype, trainable=trainable)
    compare_with_eager(case, dtype)


@TRAINABLE
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000], ids="V{}".format)
@pytest.mark.parametrize("width", [1, 64, 65], ids="D{}".format)
@pytest.mark.parametrize("rows", [1, 129], ids="M{}".format)
def test_odd_sizes_match_the_reference(rows, width, vocabulary, trainable):
    case = case_on_device(rows, width, vocabulary, "all", torch.float32, trainable=trainable)
    compare_with_eager(case, torch.float32, workspace_bytes=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_a_large_vocabulary_matches_the_reference(dtype):
    case = case_on_device(5, 24, 32_000, "all", dtype, **FROZEN)
    compare_with_eager(case, dtype, workspace_bytes=200_000)


@TRAINABLE
@DTYPES
@pytest.mark.parametrize("workspace_bytes", [1, 150_000, 64 * 2**20], ids="{}B".format)
def test_any_cut_into_groups_and_chunks_matches_the_reference(workspace_bytes, dtype, trainable):
    # 3 groups of rows by 8 chunks of one block each; 3 by 2; everything at once.
    case = case_on_device(300, 12, 1000, "all", dtype, trainable=trainable)
    compare_with_eager(case, dtype, workspace_bytes=workspace_bytes)


BREAKAGES = {
    "scale": (fused_logprobs, "logits_options", {"logit_scale": 1.01}),
    "softcap": (fused_logprobs, "logits_options", {"softcap": 2.4}),
    "no-bias": (fused_logprobs, "logits_options", {"HAS_BIAS": False}),
    "gradient-scale": (fused_head_gradients, "logits_options", {"logit_scale": 1.01}),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_comparison_sees_a_broken_kernel(monkeypatch, breakage):
    module, function, wrong = BREAKAGES[breakage]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: {**right(*args), **wrong})
    trainable = module is fused_head_gradients
    case = case_on_device(20, 12, 300, "all", torch.float32, trainable=trainable)
    with pytest.raises(AssertionError):
        compare_with_eager(case, torch.float32)


def test_the_comparison_sees_a_broken_reference_exponent(monkeypatch):
    # The second product and the last kernel must refer to the same power of two.
    values = iter([14.0, 13.0])
    monkeypatch.setattr(fused_logprobs, "headroom_of", lambda _: next(values))
    case = case_on_device(20, 12, 100, "plain", torch.float16, **FROZEN)
    with pytest.raises(AssertionError):
        compare_with_eager(case, torch.float16)


@TRAINABLE
@pytest.mark.parametrize("rows", [0, 5], ids=["no-rows", "all-ignored"])
def test_nothing_to_score_is_zero_and_still_in_the_graph(rows, trainable):
    case = case_on_device(max(rows, 1), 6, 150, dtype=torch.float32, trainable=trainable)
    hidden = case.hidden.detach()[:rows].requires_grad_()
    targets = torch.full((rows,), -100, device=DEVICE)
    logps = fused(hidden, case.weight, targets)
    assert logps.shape == (rows,) and (logps == 0).all() and logps.requires_grad
    logps.sum().backward()
    assert hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()
    assert not trainable or (case.weight.grad == 0).all()


@TRAINABLE
def test_ignored_rows_change_nothing_and_may_hold_nan(trainable):
    case = case_on_device(9, 6, 300, dtype=torch.float32, trainable=trainable)
    doubled = case._replace(
        hidden=case.hidden.detach().repeat_interleave(2, dim=0),
        targets=case.targets.repeat_interleave(2),
        grad_logps=case.grad_logps.repeat_interleave(2),
    )
    doubled.hidden[1::2] = float("nan")
    doubled.targets[1::2] = -100
    doubled.hidden.requires_grad_()
    found, expected = outcome(fused, doubled), outcome(fused, case)
    assert (found["logps"][1::2] == 0).all() and (found["hidden"][1::2] == 0).all()
    assert torch.equal(found["logps"][::2], expected["logps"])
    assert torch.equal(found["hidden"][::2], expected["hidden"])
    if trainable:
        assert torch.equal(found["weight"], expected["weight"])


@TRAINABLE
def test_layout_does_not_matter(trainable):
    case = case_on_device(9, 20, 300, dtype=torch.float32, trainable=trainable)
    expected = outcome(fused, case)
    hidden = torch.cat([case.hidden.detach()] * 2, dim=1)[:, :20].requires_grad_()
    weight = case.weight.detach().t().contiguous().t().requires_grad_(trainable)
    targets = torch.stack([case.targets] * 2, dim=1)[:, 0]
    moved = case._replace(hidden=hidden, weight=weight, targets=targets)
    assert not (hidden.is_contiguous() or weight.is_contiguous() or targets.is_contiguous())
    for name, value in outcome(fused, moved).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_row_order_and_batch_size_do_not_matter():
    # To rounding: a row's sums may be cut into other chunks.
    case = case_on_device(150, 12, 700, dtype=torch.float32, **FROZEN)
    whole = outcome(fused, case, workspace_bytes=100_000)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for rows in (order, order[:40]):
        part = case._replace(
            hidden=case.hidden.detach()[rows].requires_grad_(),
            targets=case.targets[rows],
            grad_logps=case.grad_logps[rows],
        )
        for name, value in outcome(fused, part, workspace_bytes=100_000).items():
            torch.testing.assert_close(value, whole[name][rows], rtol=1e-5, atol=1e-6)


@TRAINABLE
@DTYPES
def test_the_same_call_gives_the_same_bits(dtype, trainable):
    case = case_on_device(140, 32, 900, "all", dtype, trainable=trainable)
    first = outcome(fused, case, workspace_bytes=100_000)
    second = outcome(fused, case, workspace_bytes=100_000)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("margin", [0, 5, 15, 17, 20, 30, 60, 80, 100])
def test_memorised_token_keeps_its_relative_accuracy(margin):
    hidden, weight, targets = (t.to(DEVICE) for t in memorised(margin, vocabulary=300))
    logps = fused(hidden, weight, targets, workspace_bytes=1)
    exact = linear_logprobs_reference(hidden.double(), weight.double(), targets)
    # d near -100 is rounded to a few units of 8e-6, and nll = exp(d) inherits that; from d = -87
    # on fp32 is subnormal and an absolute step of 1.4e-45 is all there is.
    torch.testing.assert_close(logps.double(), exact.detach(), rtol=3e-5, atol=1.5e-45)
    assert (logps < 0).all()


@TRAINABLE
@DTYPES
@pytest.mark.parametrize("margin", [1, 10, 20, 40, 60])
def test_memorised_token_keeps_its_gradient(margin, dtype, trainable):
    # ORPO sends about 1 / q back to such a token: what returns is of order 1 in any dtype.
    hidden, weight, targets = (t.to(DEVICE) for t in memorised(margin, 300, dtype=dtype))
    hidden = hidden.detach().requires_grad_()
    weight = weight.requires_grad_(trainable)
    logps = fused(hidden, weight, targets, workspace_bytes=1)
    grad_logps = -1 / torch.expm1(logps.detach())
    (found,) = torch.autograd.grad(logps, hidden, grad_logps)
    wide = hidden.detach().double().requires_grad_()
    logps = linear_logprobs_reference(wide, weight.detach().double(), targets)
    (exact,) = torch.autograd.grad(logps, wide, grad_logps.double())
    assert found.abs().amax() > 0.5
    # d near -60 is rounded to a few units of 4e-6, and q inherits that.
    assert relative_error(found, exact) <= {torch.float32: 3e-5}.get(dtype, FLOORS[dtype])


@DTYPES
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_logits_beyond_the_range_of_exp_stay_exact(size, dtype):
    # A reference at the target would overflow from 88 nats on; blocks refer to themselves.
    generator = torch.Generator().manual_seed(3)
    logits = size * (2 * torch.rand(20, 400, generator=generator) - 1)
    targets = torch.randint(400, (20,), generator=generator)
    targets[0] = logits[0].argmax()
    hidden = logits.to(DEVICE, dtype).requires_grad_()
    weight = torch.eye(400, dtype=dtype, device=DEVICE)
    targets = targets.to(DEVICE)
    logps = fused(hidden, weight, targets, workspace_bytes=1)
    wide = hidden.detach().double().requires_grad_()
    exact = linear_logprobs_reference(wide, weight.double(), targets)
    (found,) = torch.autograd.grad(logps.sum(), hidden)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    # A difference of two logits of this size, each rounded to fp32 a few times.
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=size * 1e-6)
    tolerance = max(FLOORS[dtype], size * 1e-6)
    assert relative_error(found, expected) <= tolerance


@TRAINABLE
def test_nan_stays_in_its_row_and_is_never_hidden(trainable):
    case = case_on_device(7, 5, 200, dtype=torch.float32, trainable=trainable)
    clean = outcome(fused, case)
    hidden = case.hidden.detach().clone()
    hidden[3, 2] = float("nan")
    found = outcome(fused, case._replace(hidden=hidden.requires_grad_()))
    others = torch.tensor([0, 1, 2, 4, 5, 6], device=DEVICE)
    for name in ("logps", "hidden"):
        assert found[name][3].isnan().all()
        torch.testing.assert_close(found[name][others], clean[name][others])


def test_entries_masked_by_their_bias_are_left_out():
    # The whole first block, so that its logsumexp is empty.
    case = case_on_device(8, 5, 400, "bias", torch.float32, **FROZEN)
    targets = case.targets.clamp_min(200)
    bias = case.options["bias"].clone()
    bias[:200] = float("-inf")
    masked = case._replace(targets=targets, options={"bias": bias})
    kept = case._replace(
        targets=targets - 200, weight=case.weight[200:], options={"bias": bias[200:]}
    )
    found, expected = outcome(fused, masked, workspace_bytes=1), outcome(eager, kept)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_target_outside_the_vocabulary_is_nan_where_nobody_looks():
    # A GPU is not asked for the targets' range: what would be garbage must not pass for a loss.
    from lite_orpo_kernels.fused_logprobs import triton_rest_sums

    case = case_on_device(4, 6, 200, dtype=torch.float32, **FROZEN)
    head = Head(case.weight, None, None, HeadTransform(1.0, None))
    targets = torch.tensor([3, -1, 200, 10**12], device=DEVICE)
    sums = triton_rest_sums(case.hidden.detach(), head, targets, 2**20, want_direction=True)
    assert sums.log_odds_against.isnan().tolist() == [False, True, True, True]
    assert sums.direction.isnan().any(dim=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_without_grad_the_log_probabilities_are_the_same(transform):
    case = case_on_device(140, 12, 900, transform, torch.float32, **FROZEN)
    expected = outcome(fused, case)["logps"]
    with torch.no_grad():
        found = fused(case.hidden, case.weight, case.targets, **case.options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x", [0.0, 1e-6, 1e-3, 0.0999, 0.1001, 1.0, 8.0, 50.0])
def test_soft_capped_logits_keep_their_digits(x):
    # tanh is written out in the kernel: near 0, around its seam, and where it saturates.
    cap = 30.0
    hidden = torch.tensor([[x * cap, -x * cap, 0.0]], device=DEVICE)
    weight = torch.eye(3, device=DEVICE)
    for target in range(3):
        targets = torch.tensor([target], device=DEVICE)
        logps = fused(hidden, weight, targets, softcap=cap)
        exact = linear_logprobs_reference(hidden.double(), weight.double(), targets, softcap=cap)
        torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=1e-6)
