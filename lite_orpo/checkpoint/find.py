"""Which checkpoint a run goes on from: the newest complete one."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from .manifest import why_incomplete
from .staging import put_back, sync

_NAME = re.compile(r"checkpoint-(\d+)")


class PassedOver(NamedTuple):
    """A checkpoint that cannot be used, and why."""

    name: str
    reason: str


class Found(NamedTuple):
    """The newest complete checkpoint, if there is one, and newer ones that are not."""

    checkpoint: Path | None
    passed_over: list[PassedOver]


def newest_complete(output_dir: Path) -> Found:
    """Look for the newest complete checkpoint of a run.

    A folder whose replacement was cut off between two renames is put back under its name.

    Args:
        output_dir: the run's folder.
    """
    put_back(output_dir)
    steps = _checkpoints(output_dir)
    passed_over: list[PassedOver] = []
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return Found(steps[step], passed_over)
        passed_over.append(PassedOver(steps[step].name, reason))
    return Found(None, passed_over)


def set_aside(output_dir: Path, checkpoint: Path) -> list[str]:
    """Rename the checkpoints of later steps than the one that a run goes on from.

    They are damaged, or of another course of the run; the next that goes on from the newest
    one must not take them for its own.

    Args:
        output_dir: the run's folder.
        checkpoint: where it goes on from.

    Returns:
        Their new names.
    """
    match = _NAME.fullmatch(checkpoint.name)
    first = int(match.group(1)) if match else -1
    names = []
    for step, path in sorted(_checkpoints(output_dir).items()):
        if step > first:
            aside = path.with_name(f"{path.name}.superseded")
            number = 2
            while aside.exists():
                aside = path.with_name(f"{path.name}.superseded-{number}")
                number += 1
            path.rename(aside)
            names.append(aside.name)
    if names:
        sync(output_dir)  # or a loss of power gives them their names back
    return names


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        output_dir: the run's folder.
        limit: most to keep; None or 0: all.
        keep: never deleted, and counted: the newest one and the best one.
    """
    if not limit:
        return
    checkpoints = _checkpoints(output_dir)
    surplus = len(checkpoints) - max(limit, len(keep))
    for step in sorted(checkpoints):
        if surplus > 0 and checkpoints[step] not in keep:
            shutil.rmtree(checkpoints[step], ignore_errors=True)
            surplus -= 1


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    return {
        int(match.group(1)): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
