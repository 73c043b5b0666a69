"""What the Triton path costs: products, memory, launches; counted, not timed."""

import pytest
import torch
from cases import DEVICE
from test_linear_logprobs_cost import MIB, Cost

from lite_orpo_kernels import fused_head_gradients, fused_linear_logprobs, fused_logprobs
from lite_orpo_kernels.chunk_plan import plan_chunks
from lite_orpo_kernels.head import Head, HeadTransform
from lite_orpo_kernels.launch_config import GPU_CLASSES

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

CONFIGS = {
    f"{name}-{precision}": getattr(gpu_class, precision)
    for name, gpu_class in GPU_CLASSES.items()
    for precision in ("half", "full")
}


def make_head(width, vocabulary, dtype, rank=0):
    weight = torch.empty(vocabulary, width, dtype=dtype, device="meta")
    low_rank = torch.empty(vocabulary, rank, dtype=dtype, device="meta") if rank else None
    return Head(weight, low_rank, None, HeadTransform(1.0, None))


def workspace_of(chunks, head, config, keeps_weights):
    """Bytes that live while a chunk is worked on, beside results and a few numbers a row."""
    size = head.weight.element_size()
    total = 4 * chunks.rows * chunks.columns / config.logits.block_v
    if keeps_weights:
        total += size * chunks.rows * chunks.columns + 4 * chunks.rows * head.width
    if head.low_rank is not None:
        total += size * chunks.columns * head.width
    return total


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("keeps_weights", [True, False], ids=["frozen", "no-grad"])
@pytest.mark.parametrize("mib", [8, 64, 256], ids="{}MiB".format)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "rank"),
    [
        (1024, 896, 151_936, 0),
        (8192, 896, 151_936, 16),
        (4096, 2048, 128_256, 0),
        (8192, 4096, 128_256, 0),
        (8192, 2304, 256_000, 0),
        (100_000, 576, 49_152, 0),
        (1, 8192, 128_256, 0),
    ],
)
def test_chunks_fit_the_workspace(rows, width, vocabulary, rank, mib, keeps_weights, config):
    head = make_head(width, vocabulary, torch.bfloat16, rank)
    chunks = plan_chunks(rows, head, config, mib * MIB, keeps_weights=keeps_weights)
    assert chunks.rows % config.logits.block_t == chunks.columns % config.logits.block_v == 0
    assert workspace_of(chunks, head, config, keeps_weights) <= mib * MIB


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(4096, 896, 151_936), (8192, 2048, 128_256), (8192, 4096, 128_256), (4096, 2304, 256_000)],
)
def test_the_default_workspace_leaves_the_products_bound_by_arithmetic(rows, width, vocabulary):
    # Bytes per product: the head is read by each group, the sum by each chunk, e once. A card
    # does some 170 bf16 products in the time of a byte (RTX 4090, H200).
    head = make_head(width, vocabulary, torch.bfloat16)
    chunks = plan_chunks(rows, head, CONFIGS["sm_90-half"], 64 * MIB, keeps_weights=True)
    traffic = 1 / chunks.rows + 2 / chunks.columns + 1 / width
    assert 1 / traffic > 2 * 170


def test_a_workspace_too_small_for_a_tile_takes_single_tiles():
    head, config = make_head(4096, 128_256, torch.bfloat16), CONFIGS["sm_90-half"]
    chunks = plan_chunks(500, head, config, 1, keeps_weights=True)
    assert chunks == (config.logits.block_t, config.logits.block_v)


class Launches:
    """Counts the tiles of products that a kernel is launched for, and runs them."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.grids = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.grids.append((grid, kwargs))
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch):
    found = {}
    for module, name in (
        (fused_logprobs, "block_sums_kernel"),
        (fused_logprobs, "add_weighted_rows_kernel"),
        (fused_logprobs, "direction_kernel"),
        (fused_head_gradients, "coefficients_kernel"),
    ):
        found[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


def make_inputs(rows, width, vocabulary, dtype=torch.float32, *, weight=False):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, width, generator=generator).to(DEVICE, dtype).requires_grad_(),
        torch.randn(vocabulary, width, generator=generator)
        .to(DEVICE, dtype)
        .requires_grad_(weight),
        torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE),
    )


def tiles(launches, name):
    return sum(grid[0] for grid, _ in launches[name].grids)


def run(inputs, workspace_bytes=150_000):
    logps = fused_linear_logprobs(*inputs, backend="triton", workspace_bytes=workspace_bytes)
    if logps.requires_grad:
        logps.sum().backward()


def config_here():
    return fused_logprobs.launch_config(DEVICE, torch.float32)


def test_a_frozen_head_takes_two_products_of_every_tile(launches):
    inputs, tile = make_inputs(150, 40, 1000), config_here()
    run(inputs)
    rows, columns = -(-150 // tile.logits.block_t), -(-1000 // tile.logits.block_v)
    assert tiles(launches, "block_sums_kernel") == rows * columns
    # Every group meets every chunk once more, to add e @ W.
    chunks = len(launches["block_sums_kernel"].grids)
    assert len(launches["add_weighted_rows_kernel"].grids) == chunks > 1
    assert launches["coefficients_kernel"].grids == []


def test_without_grad_one_product_is_enough(launches):
    with torch.no_grad():
        run(make_inputs(150, 40, 1000))
    assert launches["add_weighted_rows_kernel"].grids == launches["direction_kernel"].grids == []
    assert not any(kw["WRITES_WEIGHTS"] for _, kw in launches["block_sums_kernel"].grids)


def test_a_head_that_trains_makes_its_logits_twice(launches):
    run(make_inputs(150, 40, 1000, weight=True))
    tile = config_here()
    rows, columns = -(-150 // tile.logits.block_t), -(-1000 // tile.logits.block_v)
    assert tiles(launches, "block_sums_kernel") == rows * columns
    assert tiles(launches, "coefficients_kernel") == rows * columns
    assert launches["direction_kernel"].grids == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_temporaries_fit_the_workspace(trainable, dtype):
    rows, width, vocabulary, workspace = 300, 40, 6000, MIB
    inputs = make_inputs(rows, width, vocabulary, dtype, weight=trainable)
    with Cost() as seen:
        run(inputs, workspace)
    size = inputs[1].element_size()
    results = inputs[1].numel() * size if trainable else 0
    # Direction and gradient, or the gradient and its fp32 sum; a dozen numbers a row.
    per_row = 2 * width * 4 + 16 * 8
    assert seen.largest_numel < rows * vocabulary
    assert seen.peak_bytes <= results + workspace + rows * per_row
