"""Properties of the Triton kernels over drawn inputs. Run as in test_triton_logprobs.py."""

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_orpo import compare_with_formula, make_tokens

from lite_orpo_kernels import fused_orpo_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), max_size=5
    ),
    seed=st.integers(0, 99),
    alpha=st.floats(0, 2),
    temperature=st.floats(0.1, 2),
)
def test_any_batch_matches_the_formula(lengths, seed, alpha, temperature):
    # Pairs without one or both of their completions, steps without pairs, no token at all.
    compare_with_formula(
        make_tokens(lengths, seed), len(lengths), alpha=alpha, temperature=temperature
    )


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(margins=st.lists(st.integers(-320, 960), min_size=1, max_size=8))
def test_log_odds_move_by_at_most_two_per_unit_of_logits(margins):
    # The L1 norm of d log odds / d logits: 2 mean(q) / (1 - p), and mean(q) <= 1 - p. W = I.
    rows = len(margins) + 1
    targets = torch.arange(rows) * 5 % 48
    logits = torch.zeros(rows, 48)
    logits.scatter_(1, targets.unsqueeze(1), torch.tensor([[m / 16] for m in [*margins, 0]]))
    hidden = logits.to(DEVICE).requires_grad_()
    ids = torch.tensor([0] * len(margins) + [1]).to(DEVICE)
    result = fused_orpo_loss(
        hidden,
        torch.eye(48, device=DEVICE),
        targets.to(DEVICE),
        ids,
        ids == 0,
        pair_count=1,
        backend="triton",
    )
    (found,) = torch.autograd.grad(result.log_odds.sum(), hidden)
    # A margin of 60 is rounded to 4e-6, and q = exp(-60) inherits a few of that.
    assert found[ids == 0].double().abs().sum() <= 2 * (1 + 3e-5)
