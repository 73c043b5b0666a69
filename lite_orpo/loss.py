"""Preference losses as pure functions of token log-probabilities.

The trainer asks here for its loss. ORPO's formula itself lives in the kernels package, which
can be imported without this one.
"""

from lite_orpo_kernels import ORPOLoss, orpo_loss

__all__ = ["ORPOLoss", "orpo_loss"]
