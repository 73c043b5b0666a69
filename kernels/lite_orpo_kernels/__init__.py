"""Log-probabilities and the ORPO loss straight from hidden states and an LM head.

This package needs torch, and triton only where its kernels run, so that any trainer can import it;
it knows nothing of `lite_orpo`. The public functions are below; everything else is private.
"""

from .backends import Backend, select_backend
from .gradient_filter import GradientFilter
from .linear_logprobs import fused_linear_logprobs
from .orpo import ORPOLoss, fused_orpo_loss, orpo_loss
from .reference import logprobs_from_logits

__all__ = [
    "Backend",
    "GradientFilter",
    "ORPOLoss",
    "fused_linear_logprobs",
    "fused_orpo_loss",
    "logprobs_from_logits",
    "orpo_loss",
    "select_backend",
]
