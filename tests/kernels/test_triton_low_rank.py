"""A head of two parts, as a LoRA on it makes: never the sum of both, on Triton and in PyTorch."""

import pytest
import torch
from cases import as_fp64, eager, relative_error
from test_triton_logprobs import DTYPES, FLOORS, TRAINABLE, case_on_device

from lite_orpo_kernels import fused_linear_logprobs, fused_logprobs
from lite_orpo_kernels.head import Head, HeadTransform
from lite_orpo_kernels.reference import linear_logprobs_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


@TRAINABLE
@DTYPES
def test_a_low_rank_head_matches_the_sum_of_both(dtype, trainable):
    # What a LoRA on the head computes, without the sum of the two weights.
    case = case_on_device(40, 24, 300, "all", dtype, trainable=False)
    extra = case_on_device(40, 3, 300, "plain", dtype, trainable=trainable)
    leaves = [case.hidden, extra.hidden] + ([extra.weight] if trainable else [])

    def run(function, **options):
        logps = function(case.hidden, case.weight, case.targets, **case.options, **options)
        return [logps, *torch.autograd.grad(logps, leaves, case.grad_logps.to(logps.dtype))]

    def whole(hidden, weight, targets, **options):
        rows = torch.cat([hidden, extra.hidden], dim=1)
        return eager(rows, torch.cat([weight, extra.weight], dim=1), targets, **options)

    exact = run_in_fp64(case, extra, trainable)
    theirs = run(whole)
    for backend in ("triton", "chunked"):
        ours = run(
            fused_linear_logprobs,
            low_rank=(extra.hidden, extra.weight),
            backend=backend,
            workspace_bytes=30_000,
        )
        for found, eagers, value in zip(ours, theirs, exact, strict=True):
            limit = 2 * relative_error(eagers, value) + FLOORS[dtype]
            assert relative_error(found, value) <= limit


@pytest.mark.parametrize("rank", [1, 8, 40, 64])
def test_a_low_rank_head_is_filled_up_to_whole_steps(rank):
    # 4096 + 8 columns would leave every load narrow; the copy is made anyway.
    rows, width = torch.ones(3, 64 + rank), 64
    head = Head(torch.ones(9, width), torch.ones(9, rank), None, HeadTransform(1.0, None))
    filled_rows, filled = fused_logprobs.aligned(rows, head)
    assert filled.width == filled_rows.shape[1] == filled.block(2, 5).shape[1]
    assert filled.width % 64 == 0 and filled.width - rows.shape[1] < 64
    assert (filled.block(2, 5)[:, 64 + rank :] == 0).all()
    plain = head._replace(low_rank=None)
    assert fused_logprobs.aligned(rows, plain) == (rows, plain)


def run_in_fp64(case, extra, trainable):
    wide, low_rank = as_fp64(case), as_fp64(extra)
    rows = torch.cat([wide.hidden, low_rank.hidden], dim=1)
    weight = torch.cat([wide.weight, low_rank.weight], dim=1)
    logps = linear_logprobs_reference(rows, weight, wide.targets, **wide.options)
    leaves = [wide.hidden, low_rank.hidden] + ([low_rank.weight] if trainable else [])
    return [logps, *torch.autograd.grad(logps, leaves, case.grad_logps)]
