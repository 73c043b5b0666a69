"""The held-out pairs: which of them training would refuse, and which prompts are trained on."""

from collections.abc import Set
from typing import NamedTuple

from ..files.sources import RowSource
from ..preparation import LengthRule
from .finding import Finding
from .leakage import SharedPrompts
from .outcome import find_nothing_held_out, find_refusal, of_held_out
from .overlong import OverlongRows
from .reading import SourceReader
from .seen_row import RowReader
from .unreadable import UnreadableRows


class HeldOut(NamedTuple):
    """What was seen of the held-out pairs."""

    source: str
    readable: int
    unreadable: int
    shared_prompts: int
    overlong: int
    """Readable rows that are left out for their length."""


def compare_held_out(
    source: RowSource, trained: Set[int], reader: SourceReader, rule: LengthRule, on_bad_row: str
) -> tuple[HeldOut | None, list[Finding]]:
    """Read the held-out pairs as training does, and compare them with those trained on.

    Args:
        source: the held-out pairs.
        trained: hashes of the training data's prompts.
        reader: reads them.
        rule: for long rows; without a limit where sizes are no tokens.
        on_bad_row: as configured.

    Returns:
        The counts (None where the time was over before the first row) and the findings.
    """
    shared = SharedPrompts(trained)
    unreadable = UnreadableRows(source.name, on_bad_row)
    overlong = OverlongRows(rule, on_bad_row)
    for seen in reader.seen_rows(source, RowReader(), unreadable):
        shared.add(seen.place, seen.prompt)
        overlong.add(seen)
    total = shared.rows + unreadable.count
    if total == 0 and reader.is_part:
        return None, []
    summary = overlong.summary()
    found = overlong.findings() + unreadable.findings(shared.rows)
    found = of_held_out(found + find_refusal(unreadable, summary, total))
    if total == 0 and unreadable.stopped is None:
        found.append(find_nothing_held_out())
    left_out = 0 if summary is None else summary.dropped
    counts = HeldOut(source.name, shared.rows, unreadable.count, shared.shared.count, left_out)
    return counts, shared.findings() + found
