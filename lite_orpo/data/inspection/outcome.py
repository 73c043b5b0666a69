"""What `lite-orpo train` would say of a data set as a whole: taken, or refused."""

from ..preparation import MAX_DROPPED_SHARE
from .finding import Finding, Severity
from .overlong import Overlong
from .unreadable import UnreadableRows


def find_refusal(
    unreadable: UnreadableRows, overlong: Overlong | None, total: int
) -> list[Finding]:
    """A finding where more rows would be left out than training allows.

    Args:
        unreadable: rows that cannot be read.
        overlong: rows over the limit; None without one.
        total: all rows.
    """
    dropped = unreadable.count + (overlong.dropped if overlong is not None else 0)
    if dropped <= MAX_DROPPED_SHARE * total:
        return []
    return [
        Finding(
            "training_refused",
            Severity.SERIOUS,
            f"Training will refuse this data: {dropped} of {total} rows would be left out "
            f"(at most {MAX_DROPPED_SHARE:.0%} may be)",
            dropped,
            (),
            "A run on what is left would not be a run on what you have.",
            "Mend the rows that the other findings name.",
        )
    ]


def of_held_out(findings: list[Finding]) -> list[Finding]:
    """The same findings, said of the held-out pairs."""
    return [f._replace(id=f"held_out_{f.id}", title=f"Held-out pairs: {f.title}") for f in findings]


def find_nothing_held_out() -> Finding:
    """The finding of a held-out file without rows."""
    return Finding(
        "held_out_empty",
        Severity.SERIOUS,
        "There are no held-out pairs: the file or data set is empty",
        0,
        (),
        "Training refuses it: nothing could be measured on it.",
        "Name another file, or none.",
    )
