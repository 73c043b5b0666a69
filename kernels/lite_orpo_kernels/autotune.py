"""Opt-in: look for better block sizes on the card at hand, for one shape and dtype.

Nothing here runs unless it is called. The fixed configurations of `launch_config.py` are what
everybody gets; a search takes about a minute and its result holds for this process.

Legend: M scored rows, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch_config import (
    LaunchConfig,
    LogitsTile,
    RowsTile,
    launch_config,
    on_device,
    overridden,
    override,
)
from .linear_logprobs import DEFAULT_WORKSPACE_BYTES, fused_linear_logprobs

LOGITS_TILES = (
    LogitsTile(128, 128, 64, 8, 3),
    LogitsTile(128, 128, 64, 8, 4),
    LogitsTile(128, 128, 32, 8, 3),
    LogitsTile(128, 128, 32, 8, 4),
    LogitsTile(64, 128, 64, 4, 3),
    LogitsTile(64, 128, 64, 8, 3),
    LogitsTile(64, 128, 32, 8, 2),
    LogitsTile(128, 256, 64, 8, 3),
)
ROWS_TILES = (
    RowsTile(128, 128, 64, 8, 3),
    RowsTile(128, 128, 64, 8, 4),
    RowsTile(128, 128, 32, 8, 3),
    RowsTile(128, 128, 32, 8, 4),
    RowsTile(64, 128, 64, 4, 3),
    RowsTile(64, 128, 32, 8, 2),
    RowsTile(128, 256, 64, 8, 3),
)


class Trial(NamedTuple):
    """One configuration that was tried."""

    config: LaunchConfig
    milliseconds: float | None
    """None where it does not compile for the card or does not fit it."""


def autotune_launch_config(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    timer: Callable[[Callable[[], None]], float] | None = None,
) -> list[Trial]:
    """Time forward and backward with a frozen head, and use the fastest block sizes from now on.

    The tile of the first product is chosen with the second's as it is, then the second's. The
    choice holds in this process for the device's class, and for half or for full precision;
    `launch_config.override(device, dtype, None)` undoes it.

    Args:
        hidden: [M, D] on a GPU, as it will be in training.
        weight: [V, D].
        targets: [M] int64 in [0, V).
        workspace_bytes: as it will be in training.
        timer: returns the milliseconds of one call; default `triton.testing.do_bench`'s median.

    Returns:
        Every trial, the fastest first; those that do not run at the end.

    Raises:
        RuntimeError: no configuration runs on this card.
    """
    timer = _median_of_bench if timer is None else timer
    leaf = hidden.detach().requires_grad_()
    frozen = weight.detach()

    def step() -> None:
        logps = fused_linear_logprobs(
            leaf,
            frozen,
            targets,
            ignore_index=None,
            backend="triton",
            workspace_bytes=workspace_bytes,
        )
        torch.autograd.grad(logps.sum(), leaf)

    device, dtype = hidden.device, hidden.dtype
    start, before = launch_config(device, dtype), overridden(device, dtype)
    trials: dict[LaunchConfig, Trial] = {}

    def fastest_of(candidates: Iterable[LaunchConfig]) -> LaunchConfig:
        for config in candidates:
            if config not in trials and config.logits.block_v % config.rows.block_c == 0:
                override(device, dtype, config)
                with on_device(device):
                    trials[config] = Trial(config, _milliseconds(step, timer))
        return _by_time(trials)[0].config

    try:
        found = fastest_of([start, *(start._replace(logits=tile) for tile in LOGITS_TILES)])
        found = fastest_of(found._replace(rows=tile) for tile in ROWS_TILES)
    finally:
        override(device, dtype, before)
    ranking = _by_time(trials)
    if ranking[0].milliseconds is None:
        raise RuntimeError("none of the known block sizes runs on this card")
    override(device, dtype, found._replace(measured="autotuned in this process"))
    return ranking


def _by_time(trials: dict[LaunchConfig, Trial]) -> list[Trial]:
    return sorted(
        trials.values(),
        key=lambda trial: math.inf if trial.milliseconds is None else trial.milliseconds,
    )


def _milliseconds(
    step: Callable[[], None], timer: Callable[[Callable[[], None]], float]
) -> float | None:
    try:
        return timer(step)
    except (
        triton.runtime.errors.OutOfResources,
        triton.runtime.errors.PTXASError,
        triton.CompilationError,
    ):
        return None


def _median_of_bench(step: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(step, warmup=50, rep=300, return_mode="median"))
