"""What only a GPU can show: sizes beyond 32-bit offsets, memory as the driver counts it, and the
PyTorch backend's GPU branches. The files test_triton_*.py run compiled there as well."""

import pytest
import torch
from cases import as_fp64, eager, make_case, outcome, relative_error

from lite_orpo_kernels import fused_linear_logprobs, fused_orpo_loss, select_backend
from lite_orpo_kernels.reference import linear_logprobs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MIB = 2**20


def inputs_on_gpu(rows, width, vocabulary, dtype=torch.bfloat16, *, trainable=False):
    generator = torch.Generator("cuda").manual_seed(0)
    made = {"generator": generator, "device": "cuda", "dtype": dtype}
    weight = torch.randn(vocabulary, width, **made) * width**-0.5
    targets = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    hidden = 8 * weight[targets] + torch.randn(rows, width, **made)
    return hidden.requires_grad_(), weight.requires_grad_(trainable), targets


def compare_some_rows(hidden, weight, targets, logps, gradient, rows):
    wide = hidden.detach()[rows].double().requires_grad_()
    exact = linear_logprobs_reference(wide, weight.detach().double(), targets[rows])
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    # Tensor cores cut their fp32 sums off: about 2e-5 of a target's logit over 528 steps of D.
    assert relative_error(logps[rows], exact) <= 6e-5
    # e, direction and gradient are each rounded to bf16.
    assert relative_error(gradient[rows], expected) <= 2**-7


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        pytest.param(17_000, 128, 128_256, id="rows-x-V"),
        pytest.param(2_200_000, 1024, 300, id="rows-x-D"),
        pytest.param(200, 8_448, 256_000, id="V-x-D"),
    ],
)
def test_sizes_beyond_32_bit_offsets(rows, width, vocabulary):
    assert max(rows * vocabulary, rows * width, vocabulary * width) > 2**31
    hidden, weight, targets = inputs_on_gpu(rows, width, vocabulary)
    logps = fused_linear_logprobs(hidden, weight, targets, ignore_index=None, backend="triton")
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert logps.isfinite().all() and gradient.isfinite().all()
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    compare_some_rows(hidden, weight, targets, logps, gradient, some)


def test_a_transposed_head_beyond_32_bit_offsets():
    hidden, weight, targets = inputs_on_gpu(130, 8_448, 256_000)
    weight = weight.t().contiguous().t()
    logps = fused_linear_logprobs(hidden, weight, targets, backend="triton")
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    some = torch.tensor([0, 64, 129], device="cuda")
    compare_some_rows(hidden, weight, targets, logps, gradient, some)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_extra_memory_is_the_workspace_and_a_row_of_width_d_per_token(trainable):
    rows, width, vocabulary = 4096, 2048, 128_256
    hidden, weight, targets = inputs_on_gpu(rows, width, vocabulary, trainable=trainable)
    leaves = [hidden] + [weight] * trainable
    for _ in range(2):  # the first call also loads cuBLAS, which keeps memory of its own
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logps = fused_linear_logprobs(hidden, weight, targets, ignore_index=None, backend="triton")
        found = torch.autograd.grad(logps.sum(), leaves)
        peak = torch.cuda.max_memory_allocated() - before
        del logps, found
    results = 2 * vocabulary * width if trainable else 0
    # Direction (or the fp32 sum) and the gradient; twenty numbers a row.
    per_row = (2 + 2 if not trainable else 4 + 2) * width + 20 * 8
    assert peak <= results + 64 * MIB + rows * per_row + MIB


def test_nothing_waits_for_the_device():
    hidden, weight, targets = inputs_on_gpu(300, 64, 1000)
    ids = torch.arange(300, device="cuda") // 75
    mask = ids % 2 == 0
    one = torch.ones((), device="cuda")

    def step(nll_normalizer):
        result = fused_orpo_loss(
            hidden,
            weight,
            targets,
            ids,
            mask,
            pair_count=2,
            ignore_index=None,
            nll_normalizer=nll_normalizer,
        )
        result.loss.backward()

    step(one)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(one)
        step(150.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_card_says_which_backend_it_takes():
    found = select_backend("cuda")
    assert found.name in ("triton", "chunked") and found.reason


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_pytorch_backend_is_no_worse_than_eager_on_a_gpu(dtype, transform, trainable):
    case = make_case(140, 123, 1000, transform, dtype, trainable=trainable, device="cuda")
    exact = outcome(linear_logprobs_reference, as_fp64(case))
    theirs = outcome(eager, case)
    ours = outcome(fused_linear_logprobs, case, backend="chunked", workspace_bytes=100_000)
    floor = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for name, value in exact.items():
        limit = 2 * relative_error(theirs[name], value) + floor
        assert relative_error(ours[name], value) <= limit, name
