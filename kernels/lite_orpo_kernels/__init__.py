"""Log-probabilities and the ORPO loss straight from hidden states and an LM head.

This package needs torch and nothing else, so that any trainer can import it; it knows
nothing of `lite_orpo`. The public functions are below; everything else is private.
"""

from .linear_logprobs import Backend, fused_linear_logprobs, select_backend
from .orpo import ORPOLoss, fused_orpo_loss, orpo_loss
from .reference import logprobs_from_logits

__all__ = [
    "Backend",
    "ORPOLoss",
    "fused_linear_logprobs",
    "fused_orpo_loss",
    "logprobs_from_logits",
    "orpo_loss",
    "select_backend",
]
