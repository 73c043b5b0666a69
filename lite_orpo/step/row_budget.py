"""How many tokens a row may have: as configured, or as many as there is memory for."""

import logging
from typing import Any

from ..data.largest_row import largest_row, longest_pair
from ..data.step_plan import RowPlanner
from ..errors import ConfigError, ModelError
from ..memory.device import free_bytes
from ..setup import pad_token_id

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 2048
# With `auto`: more tokens at a time make no step faster. The GPU's has not been measured.
_MOST_TOKENS = {"cuda": 8192}
# What `auto` leaves: other programs, and memory that an allocator tears.
_SHARE_OF_FREE = 0.85


def most_tokens(device_type: str) -> int:
    """The most that `max_tokens_per_row: auto` takes on such a device."""
    return _MOST_TOKENS.get(device_type, DEFAULT_TOKENS)


def planner_of(trainer: Any) -> tuple[RowPlanner, str]:
    """How a run's pairs become rows.

    Args:
        trainer: with its model on the device, its data prepared and its kind of rows chosen.

    Returns:
        The planner, and, where its budget was chosen here, that in words (else "").

    Raises:
        ConfigError: `auto` with a model that is sharded.
        ModelError: `auto` with a model whose memory cannot be counted.
    """
    args = trainer.args
    planner = RowPlanner(
        pad_token_id(trainer.processing_class), args.nll_tokens, DEFAULT_TOKENS,
        trainer.sharing.is_on, chosen_only=not trainer.objective.kind.uses_rejected,
    )  # fmt: skip
    if args.max_tokens_per_row != "auto":
        return planner._replace(max_tokens_per_row=args.max_tokens_per_row), ""
    if trainer.equal_rows:
        raise ConfigError(
            "max_tokens_per_row: auto counts what a whole model takes, but this one is sharded; "
            "give a number"
        )
    dataset = trainer.train_dataset
    if dataset is None:
        return planner, ""
    try:
        tokens, words = _that_fit(trainer, planner, dataset)
    except ModelError as error:
        raise ModelError(f"max_tokens_per_row: auto: {error}; give a number") from error
    return planner._replace(max_tokens_per_row=tokens), words


def _that_fit(trainer: Any, planner: RowPlanner, dataset: Any) -> tuple[int, str]:
    # Imported when it is asked for: PyTorch's fake tensors take 100 MiB for themselves.
    from ..memory.plan import MemoryPlan, plan_of_twin, row_tokens_that_fit
    from ..model.meta_twin import twin_of_model

    args = trainer.args
    twin = twin_of_model(trainer.model, checkpointing=args.is_checkpointing)
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    room = _SHARE_OF_FREE * free_bytes(args.device)
    if args.device.type == "cpu":
        room /= args.world_size  # ranks share the system's memory

    def plan_for(tokens: int) -> MemoryPlan:
        row = largest_row(planner._replace(max_tokens_per_row=tokens), dataset, pairs)
        return plan_of_twin(twin, args, row, args.device, is_fused=trainer.head.is_fused)

    def to_come(plan: MemoryPlan) -> int:
        return plan.training + plan.step

    tokens, plan = row_tokens_that_fit(
        plan_for,
        lambda plan: to_come(plan) <= room,
        most_tokens(args.device.type),
        longest_pair(planner, dataset),
    )
    figures = f"{to_come(plan) / 2**20:,.0f} MiB of {room / 2**20:,.0f}"
    if to_come(plan) > room:
        logger.warning(
            "max_tokens_per_row: auto: even one pair a row may be too much (%s, computed)", figures
        )
    return tokens, f"; up to {tokens:,} tokens a row (auto: {figures}, computed)"
