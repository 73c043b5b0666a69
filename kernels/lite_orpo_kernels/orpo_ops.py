"""The Triton form of the ORPO loss as operators and as one autograd Function.

As in `head_ops.py`, torch.compile sees each operator as one node. The formula's own file is
`orpo.py`; the kernels are in `fused_orpo.py`, which is imported when an operator first runs.

Legend: M scored rows, P pairs.
"""

from typing import Any

import torch
from torch import Tensor

from .head_ops import refuse_second_derivatives
from .launch_config import on_device
from .operators import register_operator


def _launch_orpo_terms(
    logps: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    pair_normalizer: Tensor,
    nll_normalizer: Tensor,
    pair_count: int,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `fused_orpo.ORPOTerms`."""
    from .fused_orpo import ORPOInputs, triton_orpo_terms

    inputs = ORPOInputs(completion_ids, nll_mask, pair_normalizer, nll_normalizer)
    with on_device(logps.device):
        terms = triton_orpo_terms(logps, inputs, pair_count, alpha, temperature)
    # An operator returns a plain tuple.
    loss, nll, odds, chosen, rejected, log_odds, slopes = terms
    return loss, nll, odds, chosen, rejected, log_odds, slopes


def _shapes_of_orpo_terms(
    logps: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    pair_normalizer: Tensor,
    nll_normalizer: Tensor,
    pair_count: int,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, nll, odds = (logps.new_empty(()) for _ in range(3))
    chosen, rejected, log_odds = (logps.new_empty(pair_count) for _ in range(3))
    return loss, nll, odds, chosen, rejected, log_odds, logps.new_empty(5, pair_count)


def _launch_orpo_gradient(
    completion_ids: Tensor,
    nll_mask: Tensor,
    pair_normalizer: Tensor,
    nll_normalizer: Tensor,
    slopes: Tensor,
    gradients: list[Tensor],
    alpha: float,
) -> Tensor:
    """Return d / d logps [M] from the gradients of the six outputs."""
    from .fused_orpo import ORPOInputs, triton_orpo_gradient

    inputs = ORPOInputs(completion_ids, nll_mask, pair_normalizer, nll_normalizer)
    with on_device(slopes.device):
        return triton_orpo_gradient(inputs, slopes, gradients, alpha)


def _shapes_of_orpo_gradient(
    completion_ids: Tensor,
    nll_mask: Tensor,
    pair_normalizer: Tensor,
    nll_normalizer: Tensor,
    slopes: Tensor,
    gradients: list[Tensor],
    alpha: float,
) -> Tensor:
    return slopes.new_empty(completion_ids.shape[0])


_orpo_terms = register_operator("orpo_terms", _launch_orpo_terms, _shapes_of_orpo_terms)
_orpo_gradient = register_operator("orpo_gradient", _launch_orpo_gradient, _shapes_of_orpo_gradient)


class _ORPOTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        completion_ids: Tensor,
        nll_mask: Tensor,
        pair_normalizer: Tensor,
        nll_normalizer: Tensor,
        pair_count: int,
        alpha: float,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        inputs = (completion_ids, nll_mask, pair_normalizer, nll_normalizer)
        *outputs, slopes = _orpo_terms(logps, *inputs, pair_count, alpha, temperature)
        ctx.save_for_backward(*inputs, slopes)
        ctx.alpha = alpha
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        *inputs, slopes = ctx.saved_tensors
        grad_logps = _orpo_gradient(*inputs, slopes, list(gradients), ctx.alpha)
        return grad_logps, None, None, None, None, None, None, None


def differentiable_orpo_terms(
    logps: Tensor,
    completion_ids: Tensor,
    nll_mask: Tensor,
    *,
    pair_normalizer: Tensor,
    nll_normalizer: Tensor,
    pair_count: int,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, ...]:
    """Loss, nll and odds-ratio loss [], chosen and rejected logps and log odds [P], all fp32.

    Args:
        logps: [M] fp32.
        completion_ids: [M] int64, -1 for a token of neither completion.
        nll_mask: [M] bool.
        pair_normalizer: [] what the odds-ratio terms are divided by.
        nll_normalizer: [] what the NLL is divided by.
        pair_count: P.
        alpha: strength of the odds-ratio term.
        temperature: factor on the log odds.
    """
    return _ORPOTerms.apply(
        logps.contiguous(),
        completion_ids.contiguous(),
        nll_mask.contiguous().view(torch.uint8),
        pair_normalizer.float(),
        nll_normalizer.float(),
        pair_count,
        alpha,
        temperature,
    )
