"""No row can poison the weights: a step with a non-finite loss or gradient is not taken.

Its gradients are dropped, so the optimiser moves nothing; the rows of the data set that did it
are found by scoring the step's pairs one by one, and named. After some such steps in a row the
run stops, for then it is not a row. A gradient scaler (fp16) skips steps by itself while it looks
for its scale: with one, only the loss is looked at, and once the scale is down to 1 the gradient
too, for then it is not the scale that makes it overflow.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.row_batch import Pair
from ..errors import NonFiniteError

REFUSED_STEPS = "lite_orpo/refused_steps"

logger = logging.getLogger(__name__)


class StepGuard:
    """Looks at each step's loss and gradients, and counts what it refused.

    Args:
        most_in_a_row: after so many refused steps without a good one between, the run stops.
        source: what the training data is called, for messages.
    """

    def __init__(self, most_in_a_row: int, source: str) -> None:
        self._most_in_a_row = most_in_a_row
        self._source = source
        self._in_a_row = 0
        self._refused = 0
        self._last_loss: Tensor | None = None  # what the log goes on with

    def note(self, logs: dict[str, float], taken: int) -> None:
        """Put into a log line how many steps were refused since the last one.

        Args:
            logs: of a training; the line at its end has a count only where there is one left.
            taken: steps since then that were taken. Without any, the loss is NaN, as it was.
        """
        if "loss" not in logs and not ("train_loss" in logs and self._refused):
            return
        count, self._refused = self._refused, 0
        logs[REFUSED_STEPS] = count
        if "loss" in logs and count and not taken:
            logs["loss"] = float("nan")

    def accepts(self, trainer: Any, loss: Tensor) -> bool:
        """Whether a step's loss and its gradients are finite on all ranks.

        Args:
            trainer: after the backward passes of the step.
            loss: this rank's share of it.
        """
        if self._last_loss is None:
            self._last_loss = torch.zeros_like(loss)
        is_bad = ~torch.isfinite(loss)
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is None or scaler.get_scale() <= 1.0:
            is_bad = is_bad | ~torch.isfinite(_norm(trainer.model.parameters(), loss))
        if trainer.args.world_size > 1:
            is_bad = trainer.accelerator.reduce(is_bad.float(), reduction="sum") > 0
        if bool(is_bad):  # waits for the device, once in a step
            return False
        self._in_a_row, self._last_loss = 0, loss.detach()
        return True

    def refuse(
        self, trainer: Any, pairs: Iterable[Pair], is_finite: Callable[[Pair], bool]
    ) -> Tensor:
        """Drop a step's gradients and say which rows it was.

        Args:
            trainer: of which a step was not accepted.
            pairs: the step's pairs on this rank.
            is_finite: scores one pair alone.

        Returns:
            A loss for the log in place of the step's: the last one that was finite.

        Raises:
            NonFiniteError: it was one too many in a row.
        """
        if getattr(trainer.accelerator, "scaler", None) is None:
            trainer.model.zero_grad(set_to_none=True)
        else:
            # A scaler skips a step by its gradients, which may be finite under a loss that is not.
            _spoil(trainer.model.parameters())
        self._in_a_row += 1
        self._refused += 1
        pairs = list(pairs)
        alone = [pair for pair in pairs if not is_finite(pair)]
        named = ", ".join(str(pair["row"]) for pair in (alone or pairs)[:8])
        more = ", ..." if len(alone or pairs) > 8 else ""
        which = "rows" if alone else "one of rows"
        text = (
            f"a step with a non-finite loss or gradient is not taken ({self._source}, {which} "
            f"{named}{more}, counted from 0)"
        )
        if self._in_a_row >= self._most_in_a_row:
            raise NonFiniteError(
                f"{text}; that makes {self._in_a_row} steps in a row, so it is not a single row: "
                "lower learning_rate, or look at the model's weights; they are as they were before "
                "these steps"
            )
        logger.warning("%s", text)
        assert self._last_loss is not None  # since `accepts`
        return self._last_loss * trainer.args.world_size


def _spoil(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.fill_(torch.inf)


def _norm(parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros_like(like)
    norm = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of a sharded model
        norm = norm.full_tensor()
    return norm.to(like.device)
