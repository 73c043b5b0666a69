"""`orpo_loss` and `fused_orpo_loss`: the paper's formula, what enters which term, and how steps
are cut into calls."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo_kernels import ORPOLoss, chunked, fused_orpo_loss, orpo_loss
from lite_orpo_kernels.reference import linear_logprobs_reference, orpo_loss_reference

# fp64 against fp64: summation order is all that differs.
FP64 = {"rtol": 1e-10, "atol": 1e-12}


class Batch(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    completion_ids: torch.Tensor
    nll_mask: torch.Tensor
    pair_count: int

    def call(self, **options):
        return fused_orpo_loss(*self[:5], pair_count=self.pair_count, **options)

    def rows(self, index):
        """The same batch with only these rows, or in this order."""
        changed = {name: getattr(self, name)[index] for name in ROW_FIELDS}
        changed["hidden"] = changed["hidden"].detach().requires_grad_()
        return self._replace(**changed)


ROW_FIELDS = ("hidden", "targets", "completion_ids", "nll_mask")
LENGTHS = [(2, 3, 5), (4, 1, 2), (0, 4, 1)]


def make_batch(lengths=LENGTHS, width=6, vocabulary=90, *, trainable=False, seed=0):
    """Pairs of (prompt, chosen, rejected) tokens; the NLL covers prompt and chosen."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = [], []
    for pair, (prompt, chosen, rejected) in enumerate(lengths):
        ids += [-1] * prompt + [2 * pair] * chosen + [2 * pair + 1] * rejected
        mask += [True] * (prompt + chosen) + [False] * rejected
    hidden = 2 * torch.randn(len(ids), width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return Batch(
        hidden.requires_grad_(),
        weight.requires_grad_(trainable),
        torch.randint(vocabulary, (len(ids),), generator=generator),
        torch.tensor(ids),
        torch.tensor(mask),
        len(lengths),
    )


def reference_loss(batch, alpha=0.1, temperature=1.0, **transform):
    logps = linear_logprobs_reference(batch.hidden, batch.weight, batch.targets, **transform)
    return orpo_loss_reference(
        logps,
        batch.completion_ids,
        batch.nll_mask,
        pair_count=batch.pair_count,
        alpha=alpha,
        temperature=temperature,
    )


def gradient(value, batch):
    return torch.autograd.grad(value, batch.hidden, retain_graph=True)[0]


@pytest.mark.parametrize("function", [orpo_loss, orpo_loss_reference], ids=lambda f: f.__name__)
def test_worked_example(function):
    # Chosen: p = 1/2, odds 1. Rejected: geometric mean of 1/2 and 1/8 is 1/4, odds 1/3.
    logps = -torch.tensor([2.0, 2.0, 2.0, 8.0], dtype=torch.float64).log()
    ids = torch.tensor([0, 0, 1, 1])
    found = function(logps, ids, ids == 0, pair_count=1, alpha=0.25, temperature=2.0)
    odds_ratio_loss = -math.log(9 / 10)  # sigmoid(2 log 3) = 9 / (9 + 1)
    expected = math.log(2) + 0.25 * odds_ratio_loss
    if isinstance(found, ORPOLoss):
        assert found.nll.item() == pytest.approx(math.log(2))
        assert found.odds_ratio_loss.item() == pytest.approx(odds_ratio_loss)
        assert found.log_odds.tolist() == pytest.approx([math.log(3)])
        assert found.chosen_logps.tolist() == pytest.approx([-math.log(2)])
        assert found.rejected_logps.tolist() == pytest.approx([-math.log(4)])
        found = found.loss
    assert found.item() == pytest.approx(expected)


def test_loss_from_logps_matches_the_reference():
    batch = make_batch()
    logps = -torch.linspace(1e-3, 9, len(batch.targets), dtype=torch.float64)
    arguments = (logps.requires_grad_(), batch.completion_ids, batch.nll_mask)
    options = {"pair_count": 3, "alpha": 0.7, "temperature": 0.3}
    found = orpo_loss(*arguments, **options).loss
    expected = orpo_loss_reference(*arguments, **options)
    torch.testing.assert_close(found, expected, **FP64)
    torch.testing.assert_close(
        torch.autograd.grad(found, logps), torch.autograd.grad(expected, logps), **FP64
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.4, "softcap": 3.0}], ids=str)
def test_fused_loss_matches_the_reference(transform, trainable, backend):
    batch = make_batch(trainable=trainable)
    bias = torch.linspace(-1, 1, 90, dtype=torch.float64).requires_grad_(trainable)
    transform = {**transform, "bias": bias}
    leaves = [t for t in (batch.hidden, batch.weight, bias) if t.requires_grad]
    found = batch.call(alpha=0.7, backend=backend, workspace_bytes=1, **transform).loss
    expected = reference_loss(batch, alpha=0.7, **transform)
    torch.testing.assert_close(found, expected, **FP64)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), **FP64
    )


@st.composite
def batches(draw):
    length = st.integers(1, 4)
    lengths = draw(st.lists(st.tuples(st.integers(0, 3), length, length), min_size=1, max_size=4))
    width, vocabulary = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    batch = make_batch(lengths, width, vocabulary, trainable=True, seed=draw(st.integers(0, 99)))
    rows = len(batch.targets)
    order = draw(st.permutations(range(rows)))
    mask = draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any))
    return batch.rows(torch.tensor(order))._replace(nll_mask=torch.tensor(mask))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    batch=batches(),
    alpha=st.floats(0, 2),
    temperature=st.floats(0.1, 2),
    columns=st.sampled_from([1, 3, 64]),
)
def test_any_batch_matches_the_reference(batch, alpha, temperature, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "MIN_BLOCK_COLUMNS", columns)
        found = batch.call(alpha=alpha, temperature=temperature, workspace_bytes=1).loss
        leaves = [batch.hidden, batch.weight]
        gradients = torch.autograd.grad(found, leaves)
    expected = reference_loss(batch, alpha, temperature)
    torch.testing.assert_close(found, expected, **FP64)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves), **FP64)


@pytest.mark.parametrize("output", ["loss", "everything"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradcheck(trainable, output):
    batch = make_batch([(1, 2, 3), (0, 2, 1)], width=3, vocabulary=12, trainable=trainable)

    def loss(hidden, weight):
        moved = batch._replace(hidden=hidden, weight=weight)
        result = moved.call(alpha=0.8, temperature=0.6, softcap=4.0)
        return result.loss if output == "loss" else tuple(result)

    assert torch.autograd.gradcheck(loss, (batch.hidden, batch.weight))


def test_results_are_fp32_for_half_precision_inputs():
    batch = make_batch()
    half = batch._replace(
        hidden=batch.hidden.detach().bfloat16().requires_grad_(), weight=batch.weight.bfloat16()
    )
    result = half.call()
    assert {value.dtype for value in result} == {torch.float32}
    result.loss.backward()
    assert half.hidden.grad.dtype == torch.bfloat16


def test_loss_is_the_nll_plus_alpha_times_the_odds_ratio_term():
    result = make_batch().call(alpha=0.35, temperature=0.5)
    torch.testing.assert_close(result.loss, result.nll + 0.35 * result.odds_ratio_loss)
    terms = -torch.nn.functional.logsigmoid(0.5 * result.log_odds)
    torch.testing.assert_close(result.odds_ratio_loss, terms.mean())


def test_swapping_chosen_and_rejected_turns_the_log_odds_around():
    batch = make_batch()
    ids = batch.completion_ids
    swapped = batch._replace(completion_ids=torch.where(ids < 0, ids, ids ^ 1))
    torch.testing.assert_close(swapped.call().log_odds, -batch.call().log_odds)
    torch.testing.assert_close(swapped.call().chosen_logps, batch.call().rejected_logps)


def test_rejected_tokens_are_not_in_the_nll():
    batch = make_batch()
    rejected = (batch.completion_ids >= 0) & (batch.completion_ids % 2 == 1)
    result = batch.call()
    logps = linear_logprobs_reference(batch.hidden, batch.weight, batch.targets)
    torch.testing.assert_close(result.nll, -logps[~rejected].mean())
    found = gradient(result.nll, batch)
    assert (found[rejected] == 0).all() and (found[~rejected] != 0).any(dim=1).all()


def test_tokens_of_no_completion_are_not_in_the_odds_ratio():
    batch = make_batch()
    nowhere = batch.completion_ids == -1
    assert nowhere.any()
    result = batch.call()
    found = gradient(result.odds_ratio_loss, batch)
    assert (found[nowhere] == 0).all() and (found[~nowhere] != 0).any(dim=1).all()
    without = batch.rows(~nowhere).call()
    for name in ("odds_ratio_loss", "log_odds", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(result, name), getattr(without, name))


def test_an_identical_pair_leaves_shared_parameters_alone():
    shared = make_batch([(0, 7, 0)]).rows(torch.arange(7))
    # A value that repeats in both halves: hidden states of one forward pass, used twice.
    source = shared.hidden
    batch = shared._replace(
        hidden=source.repeat(2, 1),
        targets=shared.targets.repeat(2),
        completion_ids=torch.tensor([0] * 7 + [1] * 7),
        nll_mask=torch.zeros(14, dtype=torch.bool),
    )
    result = batch.call(alpha=1.0)
    assert result.loss.item() == pytest.approx(math.log(2))
    per_row, total = torch.autograd.grad(result.loss, (batch.hidden, source))
    assert per_row.abs().amax() > 1e-3  # it is a cancellation, not an absence
    assert total.abs().amax() <= 1e-15


def test_alpha_and_temperature_agree_near_zero_log_odds():
    # The two hyper-parameters of the course: 0.1 in either place is the same first step.
    batch = make_batch([(0, 4, 4)])
    nearly_equal = batch.hidden.detach()
    # Rejected = chosen moved a little, so that the log odds ratio is small but not zero.
    nearly_equal[4:] = nearly_equal[:4] + 1e-4
    batch = batch._replace(
        hidden=nearly_equal.requires_grad_(),
        targets=batch.targets[:4].repeat(2),
        nll_mask=torch.zeros(8, dtype=torch.bool),
    )
    strength = batch.call(alpha=0.1, temperature=1.0)
    temperature = batch.call(alpha=1.0, temperature=0.1)
    assert 0 < strength.log_odds.abs() < 1e-2
    found, other = gradient(strength.loss, batch), gradient(temperature.loss, batch)
    # They differ by the sigmoid's curvature, log_odds / 2 at most.
    assert (found - other).norm() <= strength.log_odds.abs().item() / 2 * other.norm()
    assert strength.loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-2)
    assert temperature.loss.item() == pytest.approx(math.log(2), rel=1e-2)


def test_alpha_and_temperature_differ_far_from_zero():
    batch = make_batch([(0, 4, 4)])
    strength = batch.call(alpha=0.1, temperature=1.0)
    temperature = batch.call(alpha=1.0, temperature=0.1)
    assert strength.log_odds.abs() > 1
    torch.testing.assert_close(strength.log_odds, temperature.log_odds)
    found = gradient(strength.odds_ratio_loss, batch) * 0.1
    other = gradient(temperature.odds_ratio_loss, batch)
    assert (found - other).norm() > 0.2 * other.norm()


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_a_step_cut_into_calls_adds_up_to_one_call(kind):
    batch = make_batch()
    whole = batch.call(alpha=0.5)
    normalizers = {
        "pair_normalizer": kind(3.0),
        "nll_normalizer": kind(float(batch.nll_mask.sum())),
    }
    ends = [0, 17, len(batch.targets)]  # two pairs, then one
    assert batch.completion_ids[17:].min() >= 4
    losses, gradients = [], []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        part = batch.rows(slice(start, end))
        first = 0 if start == 0 else 2
        ids = part.completion_ids
        part = part._replace(
            completion_ids=torch.where(ids < 0, ids, ids - 2 * first),
            pair_count=2 if start == 0 else 1,
        )
        loss = part.call(alpha=0.5, **normalizers).loss
        losses.append(loss)
        gradients.append(gradient(loss, part))
    torch.testing.assert_close(sum(losses), whole.loss, **FP64)
    torch.testing.assert_close(torch.cat(gradients), gradient(whole.loss, batch), **FP64)


def test_rows_may_come_as_a_batch():
    batch = make_batch([(2, 3, 5), (4, 1, 5)])
    shaped = batch._replace(
        **{
            name: getattr(batch, name).unflatten(0, (4, -1)).clone()
            for name in ("hidden", "targets", "completion_ids", "nll_mask")
        }
    )
    torch.testing.assert_close(tuple(shaped.call()), tuple(batch.call()), **FP64)


def test_row_order_does_not_matter():
    batch = make_batch()
    order = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(5))
    shuffled = batch.rows(order)
    result, found = batch.call(), shuffled.call()
    torch.testing.assert_close(tuple(found), tuple(result), **FP64)
    torch.testing.assert_close(
        gradient(found.loss, shuffled), gradient(result.loss, batch)[order], **FP64
    )


def test_ignored_rows_count_nowhere():
    # Whatever their completion and their mask say.
    batch = make_batch()
    rows = len(batch.targets)
    doubled = batch.rows(torch.arange(rows).repeat_interleave(2))
    doubled.targets[1::2] = -100
    doubled.nll_mask[1::2] = True
    result, found = batch.call(), doubled.call()
    torch.testing.assert_close(tuple(found), tuple(result), **FP64)
    gradients = gradient(found.loss, doubled)
    assert (gradients[1::2] == 0).all()
    torch.testing.assert_close(gradients[0::2], gradient(result.loss, batch), **FP64)


@pytest.mark.parametrize("gone", [[2], [3], [2, 3]], ids=["no-chosen", "no-rejected", "neither"])
def test_a_pair_with_a_missing_completion_adds_nothing(gone):
    # Truncation may cut all of a completion away.
    batch = make_batch()
    whole = batch.call(alpha=1.0)
    batch = batch.rows(~torch.isin(batch.completion_ids, torch.tensor(gone)))
    result = batch.call(alpha=1.0)
    gradients = gradient(result.odds_ratio_loss, batch)
    left_over = (batch.completion_ids // 2) == 1
    assert gradients.isfinite().all() and (gradients[left_over] == 0).all()
    for name in ("log_odds", "chosen_logps", "rejected_logps"):
        assert getattr(result, name)[1] == 0
        torch.testing.assert_close(getattr(result, name)[[0, 2]], getattr(whole, name)[[0, 2]])
    terms = -torch.nn.functional.logsigmoid(whole.log_odds[[0, 2]])
    torch.testing.assert_close(result.odds_ratio_loss, terms.sum() / 3)
    assert gradient(result.loss, batch).isfinite().all()


@pytest.mark.parametrize("pair_count", [0, 2])
def test_nothing_to_learn_from_is_a_loss_of_zero_in_the_graph(pair_count):
    batch = make_batch()._replace(pair_count=pair_count)
    batch = batch._replace(
        targets=torch.full_like(batch.targets, -100),
        completion_ids=batch.completion_ids.clamp_max(2 * pair_count - 1),
    )
    result = batch.call()
    assert result.loss.item() == 0 and result.log_odds.tolist() == [0.0] * pair_count
    assert (gradient(result.loss, batch) == 0).all()


def test_without_pairs_it_is_plain_nll():
    batch = make_batch()
    batch = batch._replace(pair_count=0, completion_ids=torch.full_like(batch.completion_ids, -1))
    result = batch.call()
    logps = linear_logprobs_reference(batch.hidden, batch.weight, batch.targets)
    torch.testing.assert_close(result.loss, -logps[batch.nll_mask].mean(), **FP64)
