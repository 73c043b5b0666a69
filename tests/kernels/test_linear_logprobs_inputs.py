"""What may be passed to `fused_linear_logprobs`: ignored rows, shapes, layouts, autocast, and
what is refused in which words."""

import pytest
import torch

from lite_orpo_kernels import fused_linear_logprobs
from lite_orpo_kernels.reference import linear_logprobs_reference

BACKENDS = ["chunked", "reference"]


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def make_inputs(rows=9, width=6, vocabulary=150, dtype=torch.float64):
    hidden = normal(rows, width, dtype=dtype).requires_grad_()
    weight = normal(vocabulary, width, dtype=dtype, seed=1).requires_grad_()
    targets = torch.arange(rows) * 11 % vocabulary
    return hidden, weight, targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignored_rows_give_zero_and_get_no_gradient(ignore_index, trainable, backend):
    hidden, weight, targets = make_inputs()
    weight.requires_grad_(trainable)
    ignored = torch.tensor([0, 4, 5, 8])
    kept = torch.tensor([1, 2, 3, 6, 7])
    targets[ignored] = ignore_index
    logps = fused_linear_logprobs(
        hidden, weight, targets, ignore_index=ignore_index, backend=backend
    )
    logps.square().sum().backward()
    alone = hidden.detach()[kept].requires_grad_()
    weight_alone = weight.detach().clone().requires_grad_(trainable)
    expected = linear_logprobs_reference(alone, weight_alone, targets[kept])
    expected.square().sum().backward()
    assert (logps[ignored] == 0).all() and (hidden.grad[ignored] == 0).all()
    torch.testing.assert_close(logps[kept], expected)
    torch.testing.assert_close(hidden.grad[kept], alone.grad)
    if trainable:
        torch.testing.assert_close(weight.grad, weight_alone.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_nan(backend):
    # Padding positions of an attention without valid keys are NaN in some models.
    hidden, weight, targets = make_inputs()
    with torch.no_grad():
        hidden[2] = float("nan")
    targets[2] = -100
    logps = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    logps.sum().backward()
    assert logps.isfinite().all() and logps[2] == 0
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [0, 5], ids=["no-rows", "all-ignored"])
def test_nothing_to_score_is_zero_and_still_in_the_graph(rows, trainable, backend):
    # A rank with no scored row must still take part in the backward pass.
    hidden, weight, targets = make_inputs(rows)
    weight.requires_grad_(trainable)
    logps = fused_linear_logprobs(hidden, weight, torch.full_like(targets, -100), backend=backend)
    assert logps.shape == (rows,) and (logps == 0).all() and logps.requires_grad
    logps.sum().backward()
    assert hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()
    if trainable:
        assert (weight.grad == 0).all()


def strided(hidden):
    return torch.cat([hidden, hidden], dim=1)[:, : hidden.shape[1]]


def transposed(hidden):
    return hidden.t().contiguous().t()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("layout", [strided, transposed], ids=lambda f: f.__name__)
def test_layout_does_not_matter(layout, trainable):
    hidden, weight, targets = make_inputs()
    expected = torch.autograd.grad(
        linear_logprobs_reference(hidden, weight, targets).sum(), (hidden, weight)
    )
    moved_hidden = layout(hidden.detach()).requires_grad_()
    moved_weight = layout(weight.detach()).requires_grad_(trainable)
    moved_targets = torch.stack([targets, targets], dim=1)[:, 0]
    assert not moved_hidden.is_contiguous() and not moved_weight.is_contiguous()
    logps = fused_linear_logprobs(
        moved_hidden, moved_weight, moved_targets, backend="chunked", workspace_bytes=1
    )
    logps.sum().backward()
    torch.testing.assert_close(moved_hidden.grad, expected[0])
    if trainable:
        torch.testing.assert_close(moved_weight.grad, expected[1])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_expanded_rows_add_up_in_their_source(trainable):
    hidden, weight, _ = make_inputs(1)
    weight.requires_grad_(trainable)
    targets = torch.tensor([3, 77, 149])
    logps = fused_linear_logprobs(hidden.expand(3, -1), weight, targets, backend="chunked")
    (found,) = torch.autograd.grad(logps.sum(), hidden)
    logps = linear_logprobs_reference(hidden.repeat(3, 1), weight, targets)
    (expected,) = torch.autograd.grad(logps.sum(), hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (2, 3, 2), (0, 4)], ids=str)
def test_any_batch_shape(shape, backend):
    hidden = normal(*shape, 6).requires_grad_()
    weight = normal(150, 6, seed=1)
    targets = torch.randint(150, shape, generator=torch.Generator().manual_seed(2))
    if targets.numel() > 1:
        targets.view(-1)[1] = -100
    logps = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    assert logps.shape == shape
    expected = linear_logprobs_reference(hidden.reshape(-1, 6), weight, targets.reshape(-1))
    torch.testing.assert_close(logps, expected.reshape(shape))
    (found,) = torch.autograd.grad(logps.sum(), hidden)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_autocast_is_a_call_with_bf16_inputs(trainable, backend):
    hidden, weight, targets = make_inputs(dtype=torch.float32)
    bias = normal(150, dtype=torch.float32, seed=2).requires_grad_(trainable)
    weight.requires_grad_(trainable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused_linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    logps.sum().backward()
    wide = [hidden, weight, bias]
    half = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in wide]
    expected = fused_linear_logprobs(half[0], half[1], targets, bias=half[2], backend=backend)
    expected.sum().backward()
    assert logps.dtype == torch.float32 and torch.equal(logps, expected)
    for found, other in zip(wide, half, strict=True):
        if found.requires_grad:
            assert found.grad.dtype == torch.float32
            assert torch.equal(found.grad, other.grad.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_backward_inside_autocast_is_the_same_backward(trainable, dtype):
    hidden, weight, targets = make_inputs(dtype=dtype)
    weight.requires_grad_(trainable)
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    logps = fused_linear_logprobs(hidden, weight, targets, backend="chunked", workspace_bytes=1)
    expected = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(logps.sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_autocast_lets_mixed_dtypes_through():
    # bf16 activations and an fp32 head: what autocast training hands over.
    hidden, weight, targets = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused_linear_logprobs(hidden.detach().bfloat16(), weight, targets)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone_as_linear_does():
    hidden, weight, targets = make_inputs()
    expected = fused_linear_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(hidden, weight).dtype == torch.float64
        logps = fused_linear_logprobs(hidden, weight, targets)
    assert torch.equal(logps, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_without_grad_the_values_are_the_same(mode, backend):
    hidden, weight, targets = make_inputs()
    expected = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    with mode():
        logps = fused_linear_logprobs(hidden, weight, targets, backend=backend)
    assert not logps.requires_grad
    assert torch.equal(logps, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"weight": (150, 5)}, r"\(9, 6\) and \(150, 5\)", id="width"),
        pytest.param({"weight": (150, 6, 1)}, r"weight \[V, D\].*\(150, 6, 1\)", id="weight-3d"),
        pytest.param({"targets": torch.zeros(8, dtype=torch.int64)}, r"\(8,\).*\(9,\)", id="rows"),
        pytest.param(
            {"targets": torch.zeros(9, 1, dtype=torch.int64)}, r"\(9, 1\).*\(9,\)", id="column"
        ),
        pytest.param(
            {"targets": torch.zeros(9, dtype=torch.int32)}, "targets.*int32", id="int32-targets"
        ),
        pytest.param({"hidden": torch.zeros(9, 6, dtype=torch.int64)}, "hidden.*int64", id="ints"),
        pytest.param({"weight": torch.zeros(150, 6).half()}, "weight is.*float16", id="fp16-head"),
        pytest.param({"bias": torch.zeros(150).half()}, "bias is.*float16", id="fp16-bias"),
        pytest.param(
            {"weight": torch.zeros(150, 6, device="meta")}, "weight is on meta", id="weight-device"
        ),
        pytest.param(
            {"targets": torch.zeros(9, dtype=torch.int64, device="meta")},
            "targets is on meta",
            id="targets-device",
        ),
        pytest.param(
            {"bias": torch.zeros(150, device="meta")}, "bias is on meta", id="bias-device"
        ),
        pytest.param({"bias": torch.zeros(149)}, r"\[150\], found \(149,\)", id="bias-length"),
        pytest.param({"bias": torch.zeros(1)}, r"\[150\], found \(1,\)", id="bias-broadcast"),
        pytest.param({"softcap": 0.0}, "softcap.*0.0", id="softcap-0"),
        pytest.param({"softcap": -30.0}, "softcap.*-30", id="softcap-negative"),
        pytest.param({"softcap": float("nan")}, "softcap.*nan", id="softcap-nan"),
        pytest.param({"workspace_bytes": 0}, "workspace_bytes.*0", id="workspace"),
        pytest.param(
            {"backend": "cuda"}, "'cuda' is unknown.*auto.*chunked.*reference", id="backend"
        ),
    ],
)
def test_user_errors_name_what_is_wrong(change, words):
    arguments = {
        "hidden": torch.zeros(9, 6),
        "weight": torch.zeros(150, 6),
        "targets": torch.zeros(9, dtype=torch.int64),
    }
    for name, value in change.items():
        arguments[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=words):
        fused_linear_logprobs(**arguments)


def test_integers_are_refused_under_autocast_too():
    targets = torch.zeros(9, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="int64"):
        fused_linear_logprobs(torch.zeros(9, 6, dtype=torch.int64), torch.zeros(150, 6), targets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [-1, 150, -99])
def test_target_outside_the_vocabulary_is_named(target, backend):
    hidden, weight, targets = make_inputs()
    targets[0] = -100
    targets[3] = target
    with pytest.raises(IndexError, match=rf"target {target} lies outside \[0, 150\).*-100"):
        fused_linear_logprobs(hidden, weight, targets, backend=backend)
