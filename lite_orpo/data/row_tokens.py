"""How many tokens a data set takes through the model, by layout; read from its lengths alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class RowTokens(NamedTuple):
    """Tokens of one epoch."""

    packed: int
    """Each prompt once, no padding."""
    separate: int
    """Each prompt twice, no padding."""
    padded: int
    """Each prompt twice, batches in the data's order padded to their longest sequence."""


def count_row_tokens(dataset: Any, pairs_per_batch: int) -> RowTokens:
    """Count an epoch's tokens.

    Args:
        dataset: prepared pairs (`prepare_pairs`).
        pairs_per_batch: pairs of a batch, for the padded count.
    """
    packed = separate = padded = 0
    longest = in_batch = 0
    for prompt, chosen, rejected in pair_lengths(dataset):
        packed += prompt + chosen + rejected
        separate += 2 * prompt + chosen + rejected
        longest, in_batch = max(longest, prompt + max(chosen, rejected)), in_batch + 1
        if in_batch == pairs_per_batch:
            padded += 2 * in_batch * longest
            longest = in_batch = 0
    return RowTokens(packed, separate, padded + 2 * in_batch * longest)


def pair_lengths(dataset: Any) -> Iterator[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each prepared pair, in the data's order."""
    columns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    if not hasattr(dataset, "with_format"):
        for row in dataset:
            yield tuple(len(row[column]) for column in columns)  # type: ignore[misc]
        return
    from pyarrow import compute

    for table in dataset.with_format("arrow").iter(batch_size=1000):
        lengths = (compute.list_value_length(table[column]).to_pylist() for column in columns)
        yield from zip(*lengths, strict=True)
