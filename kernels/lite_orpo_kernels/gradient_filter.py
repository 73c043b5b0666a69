"""The filtered form of the gradient, an option: which blocks of the vocabulary it may leave out.

Blocks of the vocabulary that hold next to no probability for any row of a tile are not multiplied
out. Their probability is not dropped, as other kernels do: it goes to the mean of the block's rows
of the head, so that the gradient keeps its sum, and what is left of the error is bounded by

    sum over left-out blocks of mass * radius,    radius = largest distance of a row from the mean,

which is reported for every row.

What it saves depends on the activations and on the order of the vocabulary. On a small model of
ours (`benchmarks/filter_table.py`; 5.9 nats a token) 1.78 products instead of 2 at 0.5 % of error
with the head's rows sorted by how frequent their tokens are, and nothing at all unsorted: where the
kept share is above one half, leave the filter out. To sort, once: `order` = tokens by frequency,
pass `weight[order]` (a copy) and `order.argsort()[targets]`. Time on a GPU is not measured yet.

Legend: M rows, D hidden size, V vocabulary, B columns of a block, K = ceil(V / B) blocks.
"""

import torch
from torch import Tensor

from .launch_config import launch_config


class GradientFilter:
    """What of a frozen head's gradient may be approximated, and what the last call did of it.

    Made once for a head: it keeps the mean and the radius of each block of the head's rows. The
    log-probabilities themselves stay exact.

    Args:
        weight: [V, D] LM head; it must not change afterwards.
        min_block_mass: a block is left out for a tile of rows where each of them has at most this
            share of its probability, without the target's, in it. 0 leaves out nothing.

    Raises:
        ValueError: `min_block_mass` is not in [0, 1).
    """

    def __init__(self, weight: Tensor, *, min_block_mass: float = 2.0**-7) -> None:
        if not 0 <= min_block_mass < 1:
            raise ValueError(f"min_block_mass must be in [0, 1), found {min_block_mass}")
        self.min_block_mass = float(min_block_mass)
        self.block_columns = launch_config(weight.device, weight.dtype).logits.block_v
        self.weight = weight
        self.version = weight._version
        """Of the weight when the filter was made; torch counts changes in place."""
        self.means, self.radii = _means_and_radii(weight.detach(), self.block_columns)
        self.kept_share: Tensor | None = None
        """[] share of the (tile, block) products that the last call multiplied out."""
        self.error_bound: Tensor | None = None
        """[M] bound of the last call's error of each row's gradient, relative to its norm; rows
        that were ignored have 0. Rounding comes on top."""


@torch.no_grad()
def _means_and_radii(weight: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Mean [K, D] in the dtype of the head and largest distance from it [K] of each block."""
    means, radii = [], []
    for block in weight.split(columns):
        rows = block.float()
        mean = rows.mean(dim=0).to(weight.dtype)
        means.append(mean)
        # From the mean as it is stored, so that the bound covers its rounding too.
        radii.append((rows - mean.float()).norm(dim=1).amax())
    return torch.stack(means), torch.stack(radii)
