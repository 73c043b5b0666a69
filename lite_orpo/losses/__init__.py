"""Preference losses as pure functions of log-probabilities, importable alone.

`orpo_loss` takes token log-probabilities, for its formula lives in the kernels package; the
others take those of whole completions (`completion_logps` sums them). `objective.py` is what a
run makes of them.
"""

from lite_orpo_kernels import ORPOLoss, orpo_loss

from .completions import CompletionLogps, completion_logps
from .pairwise import cpo_loss, dpo_loss, ipo_loss, sft_loss, simpo_loss

__all__ = [
    "CompletionLogps",
    "ORPOLoss",
    "completion_logps",
    "cpo_loss",
    "dpo_loss",
    "ipo_loss",
    "orpo_loss",
    "sft_loss",
    "simpo_loss",
]
