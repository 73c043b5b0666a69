"""The registered operators: torch's own checks of them, and one node each to torch.compile."""

import pytest
import torch
from cases import DEVICE

from lite_orpo_kernels import fused_linear_logprobs, fused_orpo_loss, head_ops, orpo_loss, orpo_ops

BACKENDS = ["triton", "chunked"]
TRAINABLE = pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
pytestmark = [
    # torch.compile's own tracing, on PyTorch 2.13.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


def make_inputs(rows=9, width=12, vocabulary=150, trainable=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(DEVICE)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    targets[3] = -100
    return hidden, weight.requires_grad_(trainable), targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("want_direction", [False, True], ids=["sums", "direction"])
@pytest.mark.parametrize("parts", ["plain", "everything"])
def test_opcheck_of_the_forward_operator(backend, want_direction, parts):
    hidden, weight, targets = (t.detach() for t in make_inputs())
    extra = torch.ones(150, 2, device=DEVICE) if parts == "everything" else None
    bias = torch.ones(150, device=DEVICE) if parts == "everything" else None
    rows = hidden if extra is None else torch.cat([hidden, hidden[:, :2]], dim=1)
    softcap = None if parts == "plain" else 5.0
    options = (0.5, softcap, -100, backend, 2**20, want_direction)
    arguments = (rows, weight, extra, bias, targets, *options)
    torch.library.opcheck(head_ops._linear_logprobs, arguments)


@TRAINABLE
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_rows_that_lie_by_column(backend, trainable):
    # A compiler allocates by the shapes it was told, strides included.
    hidden, weight, targets = (t.detach() for t in make_inputs())
    hidden = hidden.t().contiguous().t()
    if trainable:
        rest_lse, scale = torch.zeros(9, device=DEVICE), torch.ones(9, device=DEVICE)
        arguments = (hidden, weight, None, None, targets, rest_lse, scale, 1.0, None, -100)
        arguments += (backend, 2**20, [True, True, False, False])
        torch.library.opcheck(head_ops._linear_logprobs_gradients, arguments)
    else:
        options = (1.0, None, -100, backend, 2**20, True)
        torch.library.opcheck(
            head_ops._linear_logprobs, (hidden, weight, None, None, targets, *options)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [[True, True, False, True], [False, True, False, False]])
def test_opcheck_of_the_gradient_operator(backend, wanted):
    hidden, weight, targets = (t.detach() for t in make_inputs())
    bias = torch.ones(150, device=DEVICE)
    rest_lse, scale = torch.zeros(9, device=DEVICE), torch.ones(9, device=DEVICE)
    arguments = (hidden, weight, None, bias, targets, rest_lse, scale)
    options = (1.0, None, -100, backend, 2**20, wanted)
    torch.library.opcheck(head_ops._linear_logprobs_gradients, (*arguments, *options))


def orpo_inputs():
    ids = torch.tensor([0, 0, 1, 1, 1, -1, 2, 3, 3], device=DEVICE)
    return ids, ids % 2 == 0


def test_opcheck_of_the_loss_operators():
    ids, mask = orpo_inputs()
    logps = -torch.linspace(0.1, 3, 9, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    inputs = (ids, mask.view(torch.uint8), one, one)
    torch.library.opcheck(orpo_ops._orpo_terms, (logps, *inputs, 2, 0.1, 1.0))
    gradients = [one] * 3 + [torch.ones(2, device=DEVICE)] * 3
    slopes = torch.ones(5, 2, device=DEVICE)
    torch.library.opcheck(orpo_ops._orpo_gradient, (*inputs, slopes, gradients, 0.1))


@TRAINABLE
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_step_has_no_graph_break_and_the_same_results(backend, trainable, dynamic):
    torch.compiler.reset()
    ids, mask = orpo_inputs()
    projection = torch.eye(12, device=DEVICE).requires_grad_()

    def step(hidden, weight, targets, projection):
        # Something for the compiler on both sides of the loss.
        rows = torch.nn.functional.silu(hidden @ projection)
        return (
            2
            * fused_orpo_loss(
                rows, weight, targets, ids, mask, pair_count=2, alpha=0.5, backend=backend
            ).loss
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (step, compiled):
        hidden, weight, targets = make_inputs(trainable=trainable)
        leaves = [hidden, projection] + [weight] * trainable
        loss = function(hidden, weight, targets, projection)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_log_probabilities_without_grad(backend):
    torch.compiler.reset()
    hidden, weight, targets = make_inputs()
    compiled = torch.compile(
        lambda h: fused_linear_logprobs(h, weight, targets, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        expected = fused_linear_logprobs(hidden, weight, targets, backend=backend)
        torch.testing.assert_close(compiled(hidden), expected, rtol=1e-6, atol=1e-7)


def test_a_second_copy_of_the_package_registers_its_own_operators(tmp_path):
    # Hubs load a package of kernels from a path, under a name of their making.
    import importlib.util
    import shutil
    import sys
    from pathlib import Path

    folder = tmp_path / "kernels_0f3a"
    shutil.copytree(Path(head_ops.__file__).parent, folder)
    spec = importlib.util.spec_from_file_location("kernels_0f3a", folder / "__init__.py")
    copy = importlib.util.module_from_spec(spec)
    sys.modules["kernels_0f3a"] = copy
    try:
        spec.loader.exec_module(copy)
        hidden, weight, targets = make_inputs()
        found = copy.fused_linear_logprobs(hidden, weight, targets)
        torch.testing.assert_close(found, fused_linear_logprobs(hidden, weight, targets))
    finally:
        for name in [name for name in sys.modules if name.startswith("kernels_0f3a")]:
            del sys.modules[name]


def test_the_loss_alone_runs_compiled_on_given_log_probabilities():
    torch.compiler.reset()
    ids, mask = orpo_inputs()
    logps = -torch.linspace(0.1, 3, 9, device=DEVICE)

    def loss(logps):
        return orpo_loss(logps, ids, mask, pair_count=2, backend="triton").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logps), loss(logps))
