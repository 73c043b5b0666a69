"""Preference training by ORPO on one laptop or consumer GPU.

Nothing heavy is imported here: each public name loads its module when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lite_orpo_kernels import fused_linear_logprobs, fused_orpo_loss

    from .chat_format import setup_chat_format
    from .config.orpo_config import ORPOConfig
    from .trainer import ORPOTrainer

__version__ = "0.1.0"

__all__ = [
    "ORPOConfig",
    "ORPOTrainer",
    "__version__",
    "fused_linear_logprobs",
    "fused_orpo_loss",
    "setup_chat_format",
]

_HOME = {
    "ORPOConfig": "lite_orpo.config.orpo_config",
    "ORPOTrainer": "lite_orpo.trainer",
    "fused_linear_logprobs": "lite_orpo_kernels",
    "fused_orpo_loss": "lite_orpo_kernels",
    "setup_chat_format": "lite_orpo.chat_format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lite_orpo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
