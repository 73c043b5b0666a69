"""The losses beside ORPO are their papers' formulas, in fp32 and at any margin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo.losses import (
    completion_logps,
    completions,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    sft_loss,
    simpo_loss,
)

BETA, GAMMA = 0.3, 0.7


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# Each as plain arithmetic in fp64, from (chosen, rejected, their reference).
FORMULAS = {
    "dpo": lambda c, r, rc, rr: -log_sigmoid(BETA * ((c - rc) - (r - rr))),
    "ipo": lambda c, r, rc, rr: ((c - rc) - (r - rr) - 1 / (2 * BETA)) ** 2,
    "simpo": lambda c, r, rc, rr: -log_sigmoid(BETA * (c - r) - GAMMA),
    "cpo": lambda c, r, rc, rr: -log_sigmoid(BETA * (c - r)),
}


def ours(name, chosen, rejected, reference_chosen, reference_rejected):
    if name in ("dpo", "ipo"):
        formula = dpo_loss if name == "dpo" else ipo_loss
        return formula(chosen, rejected, reference_chosen, reference_rejected, beta=BETA)
    if name == "simpo":
        return simpo_loss(chosen, rejected, beta=BETA, gamma=GAMMA)
    return cpo_loss(chosen, rejected, beta=BETA)


@pytest.mark.parametrize("name", FORMULAS)
@given(values=st.lists(st.floats(-60, 0, width=32), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_each_is_its_papers_formula(name, values):
    loss = ours(name, *(torch.tensor([value]) for value in values))
    # fp32 holds 60 nats to 4e-6, and IPO's square doubles it.
    assert float(loss) == pytest.approx(FORMULAS[name](*values), rel=2e-5, abs=2e-5)
    exact = ours(name, *(torch.tensor([value], dtype=torch.float64) for value in values))
    assert float(exact) == pytest.approx(FORMULAS[name](*values), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("margin", [-2e4, -100.0, 0.0, 100.0, 2e4])
def test_loss_and_gradient_are_finite_at_any_margin(name, margin):
    chosen = torch.tensor([margin / 2], requires_grad=True)
    rejected = torch.tensor([-margin / 2], requires_grad=True)
    zero = torch.zeros(1)
    loss = ours(name, chosen, rejected, zero, zero)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo"])
def test_the_gradient_asks_for_more_of_the_chosen_and_less_of_the_rejected(name):
    chosen, rejected = (torch.tensor([-3.0], requires_grad=True) for _ in range(2))
    zero = torch.zeros(1)
    ours(name, chosen, rejected, zero, zero).sum().backward()
    assert chosen.grad < 0 < rejected.grad
    assert float(chosen.grad) == -float(rejected.grad)


def test_dpo_begins_at_the_logarithm_of_two():
    logps = torch.tensor([-12.5, -300.0])
    other = torch.tensor([-80.0, -1.0])
    assert dpo_loss(logps, other, logps, other).tolist() == pytest.approx([math.log(2)] * 2)


def test_ipo_is_least_where_the_margin_is_half_of_one_over_beta():
    zero = torch.zeros(1)
    aim = torch.tensor([1 / (2 * BETA)])
    assert float(ipo_loss(aim, zero, zero, zero, beta=BETA)) == pytest.approx(0, abs=1e-12)


def test_completions_are_summed_token_by_token_and_prompts_left_out():
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], requires_grad=True)
    ids = torch.tensor([-1, 0, 1, 0, -1, 3])
    found = completion_logps(logps, ids, 2)
    assert found.chosen.tolist() == [-6.0, 0.0]
    assert found.rejected.tolist() == [-3.0, -6.0]
    assert found.mean_chosen.tolist() == [-3.0, 0.0]
    assert found.is_whole.tolist() == [True, False]
    (found.chosen[0] * 2).backward()
    assert logps.grad.tolist() == [0, 2, 0, 2, 0, 0]


def test_a_token_that_is_not_finite_spoils_its_own_completion_alone():
    logps = torch.tensor([float("nan"), -2.0, -3.0, -1.0])
    found = completion_logps(logps, torch.tensor([0, 1, 2, 3]), 2)
    assert found.chosen.isnan().tolist() == [True, False]
    assert found.rejected.tolist() == [-2.0, -1.0]


def test_half_precision_is_summed_in_fp32():
    logps = torch.full((3000,), -1.0, dtype=torch.bfloat16)
    found = completion_logps(logps, torch.zeros(3000, dtype=torch.int64), 1)
    assert found.chosen.dtype == torch.float32
    assert found.chosen.tolist() == [-3000.0]


def test_sft_is_the_sum_over_the_tokens_that_count():
    logps = torch.tensor([-1.0, float("-inf"), -3.0])
    assert float(sft_loss(logps, torch.tensor([True, False, True]))) == 4.0


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_log_probabilities_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="must both be"):
        completion_logps(torch.zeros(shape), torch.zeros(3, dtype=torch.int64), 1)


def test_a_gpus_way_of_summing_gives_the_same_sums_whatever_the_blocks(monkeypatch):
    torch.manual_seed(0)
    ids = torch.randint(-1, 14, (200,))
    logps = -torch.rand(200)
    expected = completions._sums_in_order(logps, ids, 14)
    for at_once in (1, 700, 10**6):
        monkeypatch.setattr(completions, "_ELEMENTS_AT_ONCE", at_once)
        # fp32 sums of some ten numbers below 1.
        assert torch.allclose(completions._sums_in_blocks(logps, ids, 14), expected, atol=2e-6)
    assert completions._sums_in_blocks(logps, ids, 0).shape == (0,)


def test_many_short_pairs_in_a_row_take_no_table_of_pairs_times_tokens():
    pairs, tokens = 20_000, 200_000
    ids = torch.arange(tokens) % (2 * pairs)
    logps = torch.full((tokens,), -1.0, requires_grad=True)
    # A table of booleans alone would be 8 GB, and half a minute.
    found = completion_logps(logps, ids, pairs)
    found.chosen.sum().backward()
    assert found.chosen.tolist() == [-5.0] * pairs
    assert logps.grad.sum() == tokens / 2
