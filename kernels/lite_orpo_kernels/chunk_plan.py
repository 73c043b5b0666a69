"""How a pass of the Triton kernels over rows and vocabulary is cut to fit its workspace.

Legend: M scored rows, R rows of a group, V vocabulary, C columns of a chunk, D hidden size.
"""

import math
from typing import NamedTuple

from .head import Head
from .launch_config import LaunchConfig


class Cut(NamedTuple):
    """How one pass is cut: rows per group and columns per chunk, multiples of the tiles."""

    rows: int
    columns: int


def plan_chunks(
    rows: int, head: Head, config: LaunchConfig, workspace_bytes: int, *, keeps_weights: bool
) -> Cut:
    """Cut M rows x V columns so that a chunk's temporaries fit the workspace.

    Each group reads the whole head, each chunk reads and writes the group's sum: of all cuts that
    fit, this takes the one with the least traffic per product, 1/R + 2/C. A single tile is the
    least there is, and may be more than the workspace.
    """
    tile = config.logits
    size = head.weight.element_size()
    widest = round_up(head.vocabulary, tile.block_v)
    best, least = Cut(tile.block_t, tile.block_v), math.inf
    for groups in range(1, math.ceil(rows / tile.block_t) + 1):
        count = round_up(math.ceil(rows / groups), tile.block_t)
        left = workspace_bytes - (4 * count * head.width if keeps_weights else 0)
        # A block's logsumexp for each row; e; the chunk's copy where the head has two parts.
        per_column = 4 * count / tile.block_v + (size * count if keeps_weights else 0)
        per_column += 0 if head.low_rank is None else size * head.width
        columns = min(int(left / per_column) // tile.block_v * tile.block_v, widest)
        if columns < tile.block_v:
            continue
        traffic = 1 / count + (2 / columns if columns < widest else 0)
        if traffic < least:
            # Chunks of equal width: a narrow last one would leave most of the GPU idle.
            parts = math.ceil(widest / columns)
            even = round_up(math.ceil(widest / parts), tile.block_v)
            best, least = Cut(count, even), traffic
    return best


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple that is not below the number."""
    return math.ceil(number / multiple) * multiple
