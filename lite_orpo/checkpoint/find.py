"""Which checkpoint a run goes on from: the newest complete one."""

import re
from pathlib import Path
from typing import NamedTuple

from .manifest import why_incomplete
from .staging import replaced_folder

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
    _put_back(output_dir)
    steps = {
        int(match.group(1)): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    passed_over: list[PassedOver] = []
    for step in sorted(steps, reverse=True):
        reason = why_incomplete(steps[step])
        if reason is None:
            return Found(steps[step], passed_over)
        passed_over.append(PassedOver(steps[step].name, reason))
    return Found(None, passed_over)


def _put_back(output_dir: Path) -> None:
    for path in output_dir.glob(".checkpoint-*.replaced"):
        final = output_dir / path.name[1 : -len(".replaced")]
        if replaced_folder(final) == path and not final.exists():
            path.rename(final)
