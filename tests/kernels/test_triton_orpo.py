"""The ORPO loss as Triton kernels, and the whole fused loss on top of the head's: against the
formula in fp64. Run as in test_triton_logprobs.py."""

import pytest
import torch
from cases import DEVICE, relative_error

from lite_orpo_kernels import ORPOLoss, fused_orpo, fused_orpo_loss, orpo_loss
from lite_orpo_kernels.reference import linear_logprobs_reference, orpo_loss_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# A few roundings of fp32; log odds of 60 are rounded to 4e-6, which is 1e-7 of them.
FP32 = {"rtol": 2e-6, "atol": 2e-6}


def make_tokens(lengths, seed=0, largest=6.0):
    """Token log-probabilities of pairs of (neither, chosen, rejected) tokens, in any order."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for pair, (neither, chosen, rejected) in enumerate(lengths):
        ids += [-1] * neither + [2 * pair] * chosen + [2 * pair + 1] * rejected
    ids = torch.tensor(ids, dtype=torch.int64)[torch.randperm(len(ids), generator=generator)]
    logps = -largest * torch.rand(len(ids), generator=generator)
    mask = torch.rand(len(ids), generator=generator) < 0.6
    return logps.to(DEVICE).requires_grad_(), ids.to(DEVICE), mask.to(DEVICE)


def in_fp64(logps):
    return logps.detach().double().requires_grad_()


def weighted_sum(result, seed=1):
    """One number that depends on every output, each with a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (value.double() * torch.randn(value.shape, generator=generator).to(value.device)).sum()
        for value in result
    )


def compare_with_formula(tokens, pair_count, **options):
    logps, ids, mask = tokens
    options = {"pair_count": pair_count, "alpha": 0.7, "temperature": 0.6, **options}
    wide = in_fp64(logps)
    found = orpo_loss(logps, ids, mask, backend="triton", **options)
    exact = orpo_loss(wide, ids, mask, backend="chunked", **options)
    for name, value in exact._asdict().items():
        torch.testing.assert_close(getattr(found, name).double(), value, **FP32, msg=name)
    for output in ("loss", "nll", "odds_ratio_loss", "everything"):
        one, other = (
            weighted_sum(result) if output == "everything" else getattr(result, output)
            for result in (found, exact)
        )
        (gradient,) = torch.autograd.grad(one, logps, retain_graph=True)
        (expected,) = torch.autograd.grad(other, wide, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, **FP32, msg=output)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(0, 1, 1)], id="two-tokens"),
        pytest.param([(2, 3, 5), (4, 1, 2), (0, 4, 1)], id="three-pairs"),
        # More tokens than one block, and more pairs than one block.
        pytest.param([(100, 900, 1300), (0, 5, 5)], id="long"),
        pytest.param([(0, 1, 2)] * 150, id="many"),
    ],
)
@pytest.mark.parametrize("normalizers", ["default", "floats", "tensors"])
def test_every_output_and_gradient_matches_the_formula(lengths, normalizers):
    options = {"pair_normalizer": 7.0, "nll_normalizer": 19.0}
    if normalizers == "tensors":
        options = {key: torch.tensor(value) for key, value in options.items()}
    compare_with_formula(
        make_tokens(lengths), len(lengths), **({} if normalizers == "default" else options)
    )


def test_the_formula_is_the_papers():
    logps, ids, mask = make_tokens([(2, 3, 5), (4, 1, 2)])
    found = orpo_loss(logps, ids, mask, pair_count=2, alpha=0.7, backend="triton")
    exact = orpo_loss_reference(in_fp64(logps), ids, mask, pair_count=2, alpha=0.7)
    torch.testing.assert_close(found.loss.double(), exact, **FP32)


@pytest.mark.parametrize("breakage", ["length", "temperature", "slope"])
def test_the_comparison_sees_a_broken_kernel(monkeypatch, breakage):
    terms, gradient = fused_orpo.triton_orpo_terms, fused_orpo.triton_orpo_gradient
    broken = {
        "length": (lambda lp, *rest: terms(lp[:-1].contiguous(), *rest), gradient),
        "temperature": (lambda *args: terms(*args[:-1], args[-1] * 1.01), gradient),
        "slope": (terms, lambda i, slopes, *rest: gradient(i, slopes * 1.01, *rest)),
    }[breakage]
    monkeypatch.setattr(fused_orpo, "triton_orpo_terms", broken[0])
    monkeypatch.setattr(fused_orpo, "triton_orpo_gradient", broken[1])
    with pytest.raises(AssertionError):
        compare_with_formula(make_tokens([(2, 3, 5), (4, 1, 2)]), 2)


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("mean_nll", [1e-45, 1e-37, 1e-30, 1e-8, 1e-3, 0.3, 0.49, 0.51, 30, 80])
def test_gradient_is_right_however_sure_the_model_is(mean_nll, side):
    # 0.5 is where the kernel's expansion of 1 - exp(-a) ends.
    logps, ids, mask = make_tokens([(0, 5, 3)])
    sure = {"chosen": ids == 0, "rejected": ids == 1, "both": ids >= 0}[side]
    logps = torch.where(sure, -mean_nll * (1 + logps.detach() / 60), logps.detach())
    logps = logps.requires_grad_()
    mask = torch.zeros_like(mask)
    found = orpo_loss(logps, ids, mask, pair_count=1, alpha=1.0, backend="triton")
    theirs = orpo_loss(wide := in_fp64(logps), ids, mask, pair_count=1, alpha=1.0)
    assert all(value.isfinite().all() for value in found)
    # A difference of two numbers of up to 100, each rounded to 8e-6 a few times.
    torch.testing.assert_close(found.log_odds.double(), theirs.log_odds, rtol=1e-6, atol=3e-5)
    (gradient,) = torch.autograd.grad(found.loss, logps)
    (expected,) = torch.autograd.grad(theirs.loss, wide)
    assert gradient.isfinite().all()
    for part in (ids == 0, ids == 1):
        # Log odds up to 100 are rounded to 8e-6, and sigmoid of them inherits that.
        assert relative_error(gradient[part], expected[part]) <= 1e-5


def test_the_same_call_gives_the_same_bits():
    tokens = make_tokens([(100, 900, 1300), (0, 5, 5)])

    def run():
        result = orpo_loss(*tokens, pair_count=2, backend="triton")
        return [*result, *torch.autograd.grad(weighted_sum(result), tokens[0])]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_differentiating_twice_is_refused():
    logps, ids, mask = make_tokens([(2, 3, 5)])
    result = orpo_loss(logps, ids, mask, pair_count=1, backend="triton")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(result.loss, logps, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_log_probabilities_are_raised_to_fp32(dtype):
    # 1 / (1 - p) of a sure completion is beyond fp16.
    logps, ids, mask = make_tokens([(2, 3, 5)])
    half = torch.where(ids == 1, -1e-6, logps.detach()).to(dtype).requires_grad_()
    result = orpo_loss(half, ids, mask, pair_count=1, backend="triton")
    exact = orpo_loss(wide := in_fp64(half), ids, mask, pair_count=1)
    assert {value.dtype for value in result} == {torch.float32}
    torch.testing.assert_close(result.loss.double(), exact.loss, **FP32)
    (found,) = torch.autograd.grad(result.loss, half)
    (expected,) = torch.autograd.grad(exact.loss, wide)
    assert found.dtype == dtype and found.isfinite().all()
    assert relative_error(found, expected) <= torch.finfo(dtype).eps


def test_other_dtypes_are_refused_by_name():
    logps, ids, mask = make_tokens([(2, 3, 5)])
    with pytest.raises(ValueError, match="float64"):
        orpo_loss(in_fp64(logps), ids, mask, pair_count=1, backend="triton")


FLOORS = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", FLOORS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_whole_fused_loss_matches_the_reference(trainable, dtype):
    lengths = [(3, 20, 25), (10, 4, 9), (0, 30, 7)]
    _, ids, mask = make_tokens(lengths)
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(len(ids), 24, generator=generator)).to(DEVICE, dtype)
    weight = torch.randn(700, 24, generator=generator).to(DEVICE, dtype).requires_grad_(trainable)
    targets = torch.randint(700, (len(ids),), generator=generator).to(DEVICE)
    targets[::7] = -100
    hidden.requires_grad_()
    leaves = [hidden] + [weight] * trainable
    found = fused_orpo_loss(
        hidden, weight, targets, ids, mask, pair_count=3, alpha=0.5, backend="triton"
    )
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide_weight = wide[1] if trainable else weight.double()
    logps = linear_logprobs_reference(wide[0], wide_weight, targets)
    scored = targets != -100
    exact = orpo_loss_reference(
        logps, ids.where(scored, -1), mask & scored, pair_count=3, alpha=0.5
    )
    assert isinstance(found, ORPOLoss)
    torch.testing.assert_close(found.loss.double(), exact, **FP32)
    gradients = torch.autograd.grad(found.loss, leaves)
    expected = torch.autograd.grad(exact, wide)
    for gradient, value in zip(gradients, expected, strict=True):
        # Rounded inputs of the products, a few times; see FLOORS in test_triton_logprobs.py.
        assert relative_error(gradient, value) <= FLOORS[dtype]
