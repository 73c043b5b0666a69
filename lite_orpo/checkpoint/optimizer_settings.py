"""Which optimiser a run has and how it is set, and what of that changes where a run goes on.

A saved optimiser state brings its learning rate, weight decay and betas along, and torch puts
them over those that the run was given now, without a word. What was changed between the two runs
is put back here; what a schedule changes by itself (OneCycle the betas) is left as it was.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

_IN_GROUP = {
    "learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
Change = tuple[float, float]


def optimizer_kind(args: Any, given: Any) -> dict[str, Any]:
    """Which optimiser a run has, paged or not: their states are alike.

    Args:
        args: the run's configuration.
        given: the optimiser that the trainer was given instead of a configured one, or None.
    """
    if given is None:
        name = str(getattr(args.optim, "value", args.optim))
        return {"optim": name.removeprefix("paged_"), "optim_args": args.optim_args}
    inner = getattr(given, "optimizer", given)  # accelerate's wrapper, of an earlier training
    return {"optim": type(inner).__name__, "optim_args": None}


def optimizer_settings(args: Any, given: Any) -> dict[str, float]:
    """The settings of a configuration that its optimiser keeps in its state; see above."""
    return {} if given is not None else {name: float(getattr(args, name)) for name in _IN_GROUP}


def put_changes_over(
    changes: dict[str, Change], own_groups: list[dict[str, Any]], optimizer: Any, scheduler: Any
) -> None:
    """Put changed settings over those of a state that was just loaded, and say so.

    Args:
        changes: names of settings with their values in the checkpoint and in this run.
        own_groups: settings of the parameter groups before the state was loaded.
        optimizer: with the state.
        scheduler: with its state; goes on where it is, from another learning rate.
    """
    if not changes:
        return
    for own, group in zip(own_groups, optimizer.param_groups, strict=True):
        for name in changes:
            key = _IN_GROUP[name]
            if key in group and key in own:
                group[key] = own[key]
        if "learning_rate" in changes:
            there, here = changes["learning_rate"]
            group["lr"] = group["lr"] * (here / there) if there else own["lr"]
    if "learning_rate" in changes and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
    told = "; ".join(f"{name} {here}, not {there}" for name, (there, here) in changes.items())
    logger.warning("from here on: %s", told)


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of an optimiser's parameter groups."""
    keys = {"lr", *_IN_GROUP.values()}
    return [{k: v for k, v in group.items() if k in keys} for group in optimizer.param_groups]
