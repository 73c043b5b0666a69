"""The filtered gradient: exact where nothing is left out, else within the bound it reports."""

import pytest
import torch
from cases import DEVICE, memorised, relative_error

from lite_orpo_kernels import GradientFilter, fused_linear_logprobs, fused_orpo_loss
from lite_orpo_kernels.filter_ops import _filtered_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
# Rounding of direction and gradient comes on top of the bound: that of the dtype, twice.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def make_inputs(rows=150, width=24, vocabulary=1500, dtype=torch.float32, sureness=4.0):
    """Peaked rows over a head whose blocks have something in common, as trained heads do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator)
    blocks = torch.randn(-(-vocabulary // 128), 1, width, generator=generator)
    weight = (weight + 2 * blocks.expand(-1, 128, -1).reshape(-1, width)[:vocabulary]) / width**0.5
    # Rows of one tile look at few blocks: sorted targets.
    targets = torch.randint(vocabulary, (rows,), generator=generator).sort().values
    hidden = sureness * weight[targets] + torch.randn(rows, width, generator=generator)
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype),
        targets.to(DEVICE),
    )


def gradient_of(inputs, **options):
    logps = fused_linear_logprobs(*inputs, backend="triton", **options)
    weights = torch.linspace(0.5, 2, len(logps), device=logps.device)
    return logps.detach(), torch.autograd.grad((logps * weights).sum(), inputs[0])[0].double()


def errors_of_rows(found, exact):
    return (found - exact).norm(dim=1) / exact.norm(dim=1)


@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_nothing_left_out_is_the_exact_gradient(dtype, bias):
    inputs = make_inputs(dtype=dtype)
    options = {"bias": torch.linspace(-1, 1, 1500, device=DEVICE).to(dtype)} if bias else {}
    everything = GradientFilter(inputs[1], min_block_mass=0.0)
    logps, found = gradient_of(
        inputs, gradient_filter=everything, workspace_bytes=150_000, **options
    )
    exact_logps, exact = gradient_of(inputs, workspace_bytes=150_000, **options)
    # The sums are folded in another order.
    torch.testing.assert_close(logps, exact_logps, rtol=1e-5, atol=1e-6)
    assert relative_error(found, exact) <= ROUNDING[dtype]
    assert everything.kept_share == 1 and (everything.error_bound == 0).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sureness", [2.0, 4.0, 8.0, 14.0])
@pytest.mark.parametrize("min_block_mass", [2**-12, 2**-9, 2**-6, 2**-3])
def test_the_error_of_every_row_is_within_its_bound(min_block_mass, sureness, dtype):
    inputs = make_inputs(dtype=dtype, sureness=sureness)
    kept = GradientFilter(inputs[1], min_block_mass=min_block_mass)
    logps, found = gradient_of(inputs, gradient_filter=kept, logit_scale=0.8)
    exact_logps, exact = gradient_of(inputs, logit_scale=0.8)
    torch.testing.assert_close(logps, exact_logps, rtol=1e-5, atol=1e-6)
    errors = errors_of_rows(found, exact)
    assert (errors <= kept.error_bound * (1 + 1e-3) + ROUNDING[dtype]).all()
    assert 0 < kept.kept_share <= 1
    if min_block_mass >= 2**-6 and sureness >= 4:
        # Something was left out, so the bound had something to cover; and it means something.
        assert kept.kept_share < 1 and errors.max() > 0
        assert kept.error_bound.median() < 0.5


def test_the_bound_holds_for_memorised_tokens():
    # p(y) up to 1 - 1e-17: mass is a share of the rest's, which ORPO multiplies by 1 / (1 - p).
    for margin in (5, 14, 40):
        hidden, weight, targets = (t.detach().to(DEVICE) for t in memorised(margin, 600, rows=40))
        hidden.requires_grad_()
        kept = GradientFilter(weight, min_block_mass=0.3)
        _, found = gradient_of((hidden, weight, targets), gradient_filter=kept)
        _, exact = gradient_of((hidden, weight, targets))
        assert kept.kept_share < 1
        errors = errors_of_rows(found, exact)
        assert (errors <= kept.error_bound + 1e-5).all()
        # Where everything was left out but the target, its own pull is still there.
        assert (found.gather(1, targets.unsqueeze(1)) != 0).all()


def test_compensation_is_much_better_than_leaving_out():
    # And keeps the gradient's sum over the vocabulary: a constant row of the head is not moved.
    inputs = make_inputs()
    kept = GradientFilter(inputs[1], min_block_mass=2**-6)
    ignored = GradientFilter(inputs[1], min_block_mass=2**-6)
    ignored.means = torch.zeros_like(ignored.means)
    _, exact = gradient_of(inputs)
    _, found = gradient_of(inputs, gradient_filter=kept)
    _, without = gradient_of(inputs, gradient_filter=ignored)
    assert relative_error(found, exact) < 0.5 * relative_error(without, exact)


def test_layout_does_not_matter():
    hidden, weight, targets = make_inputs(rows=40)
    kept = GradientFilter(weight, min_block_mass=2**-6)
    _, expected = gradient_of((hidden, weight, targets), gradient_filter=kept)
    moved = hidden.detach().t().contiguous().t().requires_grad_()
    assert not moved.is_contiguous()
    _, found = gradient_of((moved, weight, targets), gradient_filter=kept)
    assert relative_error(found, expected) <= 1e-6


def test_a_broken_bound_is_seen():
    inputs = make_inputs()
    kept = GradientFilter(inputs[1], min_block_mass=2**-6)
    kept.radii = kept.radii * 0.01
    _, found = gradient_of(inputs, gradient_filter=kept)
    errors = errors_of_rows(found, gradient_of(inputs)[1])
    assert not (errors <= kept.error_bound + ROUNDING[torch.float32]).all()


def test_ignored_rows_have_no_gradient_and_no_bound():
    hidden, weight, targets = make_inputs(rows=40)
    targets[::3] = -100
    kept = GradientFilter(weight, min_block_mass=2**-6)
    logps = fused_linear_logprobs(hidden, weight, targets, backend="triton", gradient_filter=kept)
    logps.sum().backward()
    assert (hidden.grad[::3] == 0).all() and (kept.error_bound[::3] == 0).all()
    assert (hidden.grad[1::3] != 0).any(dim=1).all()
    for rows in (hidden[:0], hidden):
        nothing = torch.full((len(rows),), -100, device=DEVICE)
        logps = fused_linear_logprobs(rows, weight, nothing, backend="triton", gradient_filter=kept)
        assert (logps == 0).all() and logps.requires_grad


def test_without_grad_and_off_by_default():
    inputs = make_inputs(rows=20)
    kept = GradientFilter(inputs[1])
    with torch.no_grad():
        fused_linear_logprobs(*inputs, backend="triton", gradient_filter=kept)
    assert kept.kept_share is None
    gradient_of(inputs)
    assert kept.kept_share is None


def test_it_goes_through_the_whole_loss():
    hidden, weight, targets = make_inputs(rows=60)
    ids = torch.arange(60, device=DEVICE) // 15
    kept = GradientFilter(weight, min_block_mass=2**-9)
    gradients = []
    for gradient_filter in (None, kept):
        loss = fused_orpo_loss(
            hidden,
            weight,
            targets,
            ids,
            ids % 2 == 0,
            pair_count=2,
            backend="triton",
            gradient_filter=gradient_filter,
        ).loss
        gradients.append(torch.autograd.grad(loss, hidden)[0].double())
    errors = errors_of_rows(gradients[1], gradients[0])
    assert (errors <= kept.error_bound + ROUNDING[torch.float32]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softcap": 30.0}, "soft-cap"),
        ({"backend": "chunked"}, "needs the Triton kernels"),
        ({"backend": "auto"}, "needs the Triton kernels"),
        ({"weight": "other"}, "another head"),
        ({"weight": "changed"}, "has changed since"),
        ({"weight": "trains"}, "frozen head"),
        ({"low_rank": True}, "low_rank"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(change, words):
    if change.get("backend") == "auto" and DEVICE != "cpu":
        pytest.xfail("on a GPU auto is Triton")
    hidden, weight, targets = make_inputs(rows=6)
    kept = GradientFilter(weight)
    options = {"backend": "triton", **change}
    if options.pop("weight", None) is not None:
        if change["weight"] == "changed":
            weight.mul_(1.5)
        weight = {"other": weight.clone, "trains": weight.requires_grad_}.get(
            change["weight"], lambda: weight
        )()
    if options.pop("low_rank", None):
        options["low_rank"] = (hidden[:, :2].detach(), weight[:, :2])
    with pytest.raises(ValueError, match=words):
        fused_linear_logprobs(hidden, weight, targets, gradient_filter=kept, **options)


def test_a_square_head_turned_over_is_another_head():
    weight = torch.randn(64, 64, device=DEVICE)
    hidden = torch.randn(3, 64, device=DEVICE).requires_grad_()
    with pytest.raises(ValueError, match="another head"):
        fused_linear_logprobs(
            hidden,
            weight.t(),
            torch.arange(3, device=DEVICE),
            backend="triton",
            gradient_filter=GradientFilter(weight),
        )


@pytest.mark.parametrize("mass", [-0.1, 1.0, 2.0])
def test_a_mass_that_is_no_share_is_refused(mass):
    with pytest.raises(ValueError, match="min_block_mass"):
        GradientFilter(torch.zeros(9, 4), min_block_mass=mass)


def test_opcheck_of_the_operator():
    hidden, weight, targets = (t.detach() for t in make_inputs(rows=6))
    kept = GradientFilter(weight)
    arguments = (hidden, weight, None, targets, kept.means, kept.radii, 1.0, None, 2**20, 0.01)
    torch.library.opcheck(_filtered_logprobs, arguments)


def test_the_same_call_gives_the_same_bits():
    inputs = make_inputs()
    kept = GradientFilter(inputs[1], min_block_mass=2**-6)
    first, second = (gradient_of(inputs, gradient_filter=kept) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
