"""At the end of a training: the memory that it took beside what the plan foresees."""

from typing import Any

from rich.console import Console

from ..config.run_config import RunConfig
from ..data.largest_row import largest_row


def print_memory(
    console: Console, config: RunConfig, trainer: Any, allocated: int | None, beyond: int | None
) -> None:
    """Say in one line what the training took, and what `lite-orpo plan` makes of it.

    Args:
        console: where to.
        config: the run's.
        trainer: after the training.
        allocated: most bytes in use on the GPU; None: not on one.
        beyond: bytes of the process beyond the loaded model, at their highest; None: not known.
    """
    measured = beyond if allocated is None else allocated
    if measured is None or not trainer.is_world_process_zero():
        return
    what = "on the GPU" if allocated is not None else "beyond the loaded model"
    text = f"Memory: {measured / 2**20:,.0f} MiB {what} at the highest"
    with console.status("Comparing with the memory plan"):
        foreseen, reason = _foreseen(config, trainer, in_all=allocated is not None)
    if foreseen is None:
        console.print(f"{text}; not planned: {reason}", soft_wrap=True)
        return
    text += f", {foreseen / 2**20:,.0f} MiB planned"
    if trainer.room.max_tokens < trainer.planner.max_tokens_per_row:
        text += f"; memory ran out, and rows were cut to {trainer.room.max_tokens:,} tokens"
    console.print(text, soft_wrap=True)


def _foreseen(config: RunConfig, trainer: Any, *, in_all: bool) -> tuple[int | None, str]:
    args = config.training
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    try:
        # Imported when it is asked for: PyTorch's fake tensors take 100 MiB for themselves.
        from ..memory.plan import plan_memory

        row = largest_row(trainer.planner, trainer.train_dataset, pairs)
        plan = plan_memory(config.model, config.lora, args, row, args.device)
    except Exception as error:  # noqa: BLE001 (the run is done and saved: nothing may fail it now)
        return None, (str(error) or type(error).__name__).splitlines()[0]
    return (plan.total if in_all else plan.training + plan.step), ""
