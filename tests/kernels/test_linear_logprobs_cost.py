"""What `fused_linear_logprobs` costs: matrix products, temporaries, saved tensors; and that the
same call gives the same bits."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lite_orpo_kernels import fused_linear_logprobs, head_ops

MIB = 2**20
# Where each product's two factors stand among its arguments (torch's own FLOP counter does not
# know the in-place one).
FACTORS_OF_PRODUCTS = {
    torch.ops.aten.mm: slice(0, 2),
    torch.ops.aten.addmm: slice(1, 3),
    torch.ops.aten.addmm_: slice(1, 3),
}

# torch shows a dispatch mode each of our operators as one call: what runs inside is what counts.
INSIDE_OF_OPERATORS = {
    head_ops._linear_logprobs: head_ops._logprobs_of_kept_rows,
    head_ops._linear_logprobs_gradients: head_ops._gradients_of_kept_rows,
}


class Cost(TorchDispatchMode):
    """What runs while it is on: matrix products, the largest tensor made, and the most bytes
    of new tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.largest_numel = 0
        self.peak_bytes = 0
        self.matrix_products = 0
        self.flops = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INSIDE_OF_OPERATORS:
            with self:
                return INSIDE_OF_OPERATORS[func](*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:
            return out  # Triton's interpreter, looking at a tensor that is there
        factors = FACTORS_OF_PRODUCTS.get(func.overloadpacket)
        if factors is not None:
            left, right = args[factors]
            self.matrix_products += 1
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in filter(_is_tensor, tree_iter(out)):
            storage = tensor.untyped_storage()
            if storage._cdata in given and storage._cdata not in self._alive:
                continue  # an input of the caller's, or a view of one
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.largest_numel = max(self.largest_numel, tensor.numel())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def make_inputs(rows, width, vocabulary, dtype=torch.float32, *, hidden=True, weight=False):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, width, generator=generator).to(dtype).requires_grad_(hidden),
        torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_(weight),
        torch.randint(vocabulary, (rows,), generator=generator),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_tensor_of_rows_times_vocabulary_is_made(trainable, softcap, backend):
    rows, width, vocabulary = 256, 64, 50_000
    inputs = make_inputs(rows, width, vocabulary, weight=trainable)
    with Cost() as seen:
        logps = fused_linear_logprobs(
            *inputs, softcap=softcap, backend=backend, workspace_bytes=4 * MIB
        )
        logps.sum().backward()
    if backend == "reference":  # the instrument sees what it is there to see
        assert seen.largest_numel >= rows * vocabulary
        return
    workspace = 4 * MIB // 4
    head_gradient = vocabulary * width if trainable else 0
    assert seen.largest_numel <= max(workspace, head_gradient) < rows * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [4, 256], ids="M{}".format)
def test_temporaries_fit_the_workspace(rows, trainable, softcap, dtype):
    width, vocabulary = 64, 50_000
    inputs = make_inputs(rows, width, vocabulary, dtype, weight=trainable)
    with Cost() as seen:
        fused_linear_logprobs(
            *inputs, softcap=softcap, backend="chunked", workspace_bytes=4 * MIB
        ).sum().backward()
    results = inputs[1].numel() * inputs[1].element_size() if trainable else 0
    # The rows, their accumulator, the targets' rows of the head and the result, in fp32; and a
    # dozen numbers per row.
    per_row = 4 * width * 4 + 12 * 8
    assert seen.peak_bytes <= results + 4 * MIB + rows * per_row


@pytest.mark.parametrize(
    ("workspace_bytes", "blocks"), [(64 * MIB, 1), (64_000, 2), (20_000, 7), (1, 16)]
)
def test_workspace_sets_the_number_of_blocks(workspace_bytes, blocks):
    hidden, weight, targets = make_inputs(15, 12, 1000, torch.float64)
    with torch.no_grad(), Cost() as seen:
        fused_linear_logprobs(
            hidden, weight, targets, backend="chunked", workspace_bytes=workspace_bytes
        )
    assert seen.matrix_products == blocks


@pytest.mark.parametrize("workspace_bytes", [MIB, 1], ids=["one-block", "blocks"])
@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "gemms"),
    [
        pytest.param(False, False, False, 1, id="nothing-asked"),
        pytest.param(True, False, False, 2, id="frozen-head"),
        pytest.param(True, True, False, 4, id="hidden-and-weight"),
        pytest.param(False, True, False, 3, id="weight-only"),
        pytest.param(False, False, True, 2, id="bias-only"),
        pytest.param(True, True, True, 4, id="everything"),
    ],
)
def test_only_the_gradients_asked_for_are_computed(hidden, weight, bias, gemms, workspace_bytes):
    # In units of one logits product, 2 M D V.
    rows, width, vocabulary = 8, 16, 1024
    tensors = make_inputs(rows, width, vocabulary, hidden=hidden, weight=weight)
    offset = torch.zeros(vocabulary, requires_grad=bias)
    with Cost() as seen:
        logps = fused_linear_logprobs(
            *tensors, bias=offset, backend="chunked", workspace_bytes=workspace_bytes
        )
        assert logps.requires_grad == (hidden or weight or bias)
        if logps.requires_grad:
            logps.sum().backward()
    assert seen.flops == gemms * 2 * rows * width * vocabulary
    found = [t.grad is not None for t in (tensors[0], tensors[1], offset)]
    assert found == [hidden, weight, bias]


def test_without_grad_one_product_is_enough():
    tensors = make_inputs(8, 16, 1024)
    with torch.no_grad(), Cost() as seen:
        fused_linear_logprobs(*tensors, backend="chunked")
    assert seen.flops == 2 * 8 * 16 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_frozen_head_saves_one_row_of_width_d_per_token(dtype):
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    tensors = make_inputs(8, 16, 1024, dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = fused_linear_logprobs(*tensors, backend="chunked")
    assert sorted(saved) == [(8,), (8, 16)]
    logps.sum().backward()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_same_call_gives_the_same_bits(trainable):
    def run():
        tensors = make_inputs(100, 32, 3000, weight=trainable)
        logps = fused_linear_logprobs(*tensors, backend="chunked", workspace_bytes=100_000)
        logps.square().sum().backward()
        return logps, tensors[0].grad, tensors[1].grad

    torch.use_deterministic_algorithms(False)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(True)
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
