"""The losses that a run can ask for by `loss_type`, and what each needs.

A table without torch; the formulas are in `losses/`.
"""

from typing import NamedTuple


class LossType(NamedTuple):
    """What is particular to a loss."""

    beta: float
    """Default of `beta`."""
    uses_nll: bool
    is_of_means: bool
    """Whether completions count by their mean log-probability or by their sum."""
    uses_reference: bool
    uses_rejected: bool = True
    nll_tokens: str = "completion"
    """Default of `nll_tokens`."""
    own_settings: tuple[str, ...] = ()
    """Settings that only this loss has."""


LOSS_TYPES = {
    "orpo": LossType(
        0.1, True, True, False,
        nll_tokens="prompt_and_completion", own_settings=("orpo_alpha", "orpo_beta"),
    ),
    "dpo": LossType(0.1, False, False, True),
    "ipo": LossType(0.1, False, True, True),
    "simpo": LossType(2.0, False, True, False, own_settings=("simpo_gamma",)),
    "cpo": LossType(0.1, True, False, False, own_settings=("cpo_alpha",)),
    "sft": LossType(0.0, True, True, False, uses_rejected=False),
}  # fmt: skip
DEFAULT_SIMPO_GAMMA = 1.0  # half of beta, as with the paper's Llama 3 base
DEFAULT_CPO_ALPHA = 1.0
