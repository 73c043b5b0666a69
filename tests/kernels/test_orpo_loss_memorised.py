"""The ORPO loss where the model is sure of a completion: finite, and with the right gradient,
from margins of 0 to beyond where fp32 has no number for 1 - p."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo_kernels import fused_orpo_loss
from lite_orpo_kernels.reference import linear_logprobs_reference, orpo_loss_reference

VOCABULARY = 48
LENGTHS = {"chosen": 5, "rejected": 3}


class Rows(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    completion_ids: torch.Tensor
    nll_mask: torch.Tensor


def make_rows(chosen_margins, rejected_margins, dtype=torch.float32):
    """One pair whose target logits stand this far above the others; W = I, so z = h."""
    generator = torch.Generator().manual_seed(11)
    margins = torch.tensor([*chosen_margins, *rejected_margins], dtype=torch.float32)
    rows = len(margins)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    # Multiples of 1/16 below 1: exact in every dtype.
    logits = torch.randint(-15, 1, (rows, VOCABULARY), generator=generator) / 16
    logits.scatter_(1, targets.unsqueeze(1), margins.unsqueeze(1))
    ids = torch.tensor([0] * len(chosen_margins) + [1] * len(rejected_margins))
    weight = torch.eye(VOCABULARY, dtype=dtype)
    return Rows(logits.to(dtype).requires_grad_(), weight, targets, ids, ids == 0)


def spread(margin, length):
    """Margins of one completion: no two tokens alike, the mean at `margin`."""
    return [margin + (token - (length - 1) / 2) / 4 for token in range(length)]


def margins_of(which, margin):
    return [
        spread(margin if which in (name, "both") else 1.0, length)
        for name, length in LENGTHS.items()
    ]


def exact_gradient(rows, alpha):
    """The same inputs in fp64, where the paper's formula as it stands is accurate enough."""
    hidden = rows.hidden.detach().double().requires_grad_()
    logps = linear_logprobs_reference(hidden, rows.weight.double(), rows.targets)
    loss = orpo_loss_reference(logps, rows.completion_ids, rows.nll_mask, pair_count=1, alpha=alpha)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("which", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("margin", [0, 1, 5, 10, 15, 16, 17, 18, 20, 21, 30, 45, 60])
def test_gradient_is_right_at_any_margin(margin, which, backend):
    rows = make_rows(*margins_of(which, margin))
    result = fused_orpo_loss(*rows, pair_count=1, alpha=1.0, backend=backend)
    loss, expected = exact_gradient(rows, alpha=1.0)
    assert all(value.isfinite().all() for value in result)
    # A log odds of 60 is rounded to 4e-6, and exp() of it inherits that.
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=0)
    (found,) = torch.autograd.grad(result.loss, rows.hidden)
    for name, part in (("chosen", rows.nll_mask), ("rejected", ~rows.nll_mask)):
        error = (found[part].double() - expected[part]).norm() / expected[part].norm()
        assert error <= 1e-5, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Direction and gradient are each rounded once, by half a unit.
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("which", ["rejected", "both"])
@pytest.mark.parametrize("margin", [0, 8, 16, 30, 60])
def test_half_precision_gradient_is_right_at_any_margin(margin, which, trainable, dtype, tolerance):
    rows = make_rows(*margins_of(which, margin), dtype=dtype)
    rows.weight.requires_grad_(trainable)
    result = fused_orpo_loss(*rows, pair_count=1, alpha=1.0)
    (found,) = torch.autograd.grad(result.loss, rows.hidden)
    _, expected = exact_gradient(rows._replace(weight=rows.weight.detach()), alpha=1.0)
    rejected = ~rows.nll_mask
    error = (found[rejected].double() - expected[rejected]).norm() / expected[rejected].norm()
    assert error <= tolerance


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("which", ["chosen", "rejected", "both"])
def test_certainty_is_finite_and_has_no_gradient(which, trainable):
    rows = make_rows(*margins_of(which, 200.0))
    rows.weight.requires_grad_(trainable)
    result = fused_orpo_loss(*rows, pair_count=1, alpha=1.0)
    certain = {"chosen": rows.nll_mask, "rejected": ~rows.nll_mask}
    certain = certain.get(which, torch.ones_like(rows.nll_mask))
    assert all(value.isfinite().all() for value in result)
    logps = {"chosen": result.chosen_logps, "rejected": result.rejected_logps}
    assert all((logps[name] == 0).all() for name in LENGTHS if which in (name, "both"))
    result.loss.backward()
    assert (rows.hidden.grad[certain] == 0).all()
    assert rows.hidden.grad.isfinite().all()
    if which == "rejected":  # being sure of the rejected one is what ORPO is against
        assert result.loss > 50 and (rows.hidden.grad[~certain] != 0).any()
    if trainable:
        assert rows.weight.grad.isfinite().all()


@pytest.mark.parametrize("margin", range(80, 112, 2))
def test_gradient_stays_bounded_where_fp32_runs_out(margin):
    # From nll = 1e-38 to 0: subnormal q, and 1 / (1 - p) at its largest.
    rows = make_rows([margin] * 4, [margin] * 4)
    result = fused_orpo_loss(*rows, pair_count=1, alpha=1.0)
    result.loss.backward()
    assert all(value.isfinite().all() for value in result)
    assert rows.hidden.grad.isfinite().all()
    assert rows.hidden.grad.abs().sum() <= 4 * 0.5 * 1.001


def test_one_certain_token_among_ordinary_ones_changes_nothing_for_them():
    rows = make_rows([1.0, 200.0, 2.0], [0.5, 200.0, 1.5])
    result = fused_orpo_loss(*rows, pair_count=1, alpha=1.0)
    (found,) = torch.autograd.grad(result.loss, rows.hidden)
    _, expected = exact_gradient(rows, alpha=1.0)
    assert (found[1] == 0).all() and (found[4] == 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(margins=st.lists(st.integers(-320, 1600), min_size=1, max_size=8))
def test_log_odds_move_by_at_most_two_per_unit_of_logits(margins):
    # The L1 norm of d log odds / d logits: 2 mean(q) / (1 - p), and mean(q) <= 1 - p.
    margins = [margin / 16 for margin in margins]  # -20 to 100 nats
    rows = make_rows(margins, [0.0])
    result = fused_orpo_loss(*rows, pair_count=1)
    (found,) = torch.autograd.grad(result.log_odds.sum(), rows.hidden)
    norm = found[rows.nll_mask].double().abs().sum()
    # A margin of 100 is rounded to 4e-6, and q = exp(-100) inherits that.
    assert norm <= 2 * (1 + 1e-5)
    if max(margins) < 60 and max(margins) - min(margins) < 0.1:
        assert norm >= 1.99  # reached where the tokens are alike
