"""What holds while a step's rows pass the model, forward and backward, and at no other time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model.adapter import no_needless_casts


@contextmanager
def step_context(trainer: Any) -> Iterator[None]:
    """Attention over packed rows, and no casts that autocast undoes; not in between two steps.

    A callback may generate between steps, and a model that is saved or used elsewhere is as it was.
    """
    model = trainer.model
    # Accelerate puts autocast around a model's forward when it prepares it, and keeps the old one.
    is_autocast = trainer.accelerator.native_amp and hasattr(model, "_original_forward")
    with trainer.sharing.attending(model), no_needless_casts(model, is_autocast=is_autocast):
        yield
