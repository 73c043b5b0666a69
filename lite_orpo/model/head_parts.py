"""What a model's output head computes with: a linear layer, and maybe a LoRA on it.

Never `.weight` of a wrapped head: it leaves the adapter out, or is a stale original. What is not
understood to the last term is not taken apart; the seam then keeps the model's own logits.

Legend: M scored rows, D hidden size, r rank, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(NamedTuple):
    """One LoRA: it adds scaling * up(down(dropout(rows)))."""

    down: nn.Linear  # A, [r, D]
    up: nn.Linear  # B, [V, r]
    dropout: nn.Module
    scaling: float


class HeadParts(NamedTuple):
    """A head that is one linear layer, with the adapters that are switched on."""

    linear: nn.Linear
    adapters: tuple[LowRank, ...]

    def low_rank(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """(rows [M, r], head [V, r]) of all adapters side by side, in the dtype of `rows`."""
        if not self.adapters:
            return None
        scaled = [
            adapter.down(adapter.dropout(rows.to(adapter.down.weight.dtype))) * adapter.scaling
            for adapter in self.adapters
        ]
        heads = [adapter.up.weight for adapter in self.adapters]
        return torch.cat(scaled, dim=-1).to(rows.dtype), torch.cat(heads, dim=-1).to(rows.dtype)

    def product(self, rows: Tensor) -> Tensor:
        """The head's logits [M, V] before any transform, fp32: for comparisons on few rows."""
        logits = F.linear(rows, self.linear.weight, self.linear.bias).float()
        low_rank = self.low_rank(rows)
        return logits if low_rank is None else logits + F.linear(*low_rank).float()


def parts_of_head(head: Any) -> HeadParts | None:
    """Take a head apart as it is switched now, or None if it is more than is known here."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        # PEFT keeps two copies; which one counts changes when the adapter is switched off.
        if head.disable_adapters or not head.active_adapters:
            return parts_of_head(head.original_module)
        return parts_of_head(head.modules_to_save[head.active_adapters[0]])
    if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
        return _parts_of_lora(head)
    # A quantised head may store its bits in a floating dtype; its shape gives it away.
    is_plain = (
        isinstance(head, nn.Linear)
        and head.weight.is_floating_point()
        and head.weight.shape == (head.out_features, head.in_features)
        and not hasattr(head.weight, "quant_state")
    )
    return HeadParts(head, ()) if is_plain else None


def _parts_of_lora(head: Any) -> HeadParts | None:
    from peft.tuners.lora import Linear

    base = parts_of_head(head.base_layer)
    # Its quantised and its other relatives have forward passes of their own.
    if base is None or type(head) is not Linear or head.fan_in_fan_out:
        return None
    if head.disable_adapters or head.merged:
        # A merged adapter is in the base weight; switched off, PEFT would take it out first.
        return None if head.disable_adapters and head.merged else base
    active = [name for name in head.active_adapters if name in head.lora_A]
    adapters = []
    for name in active:
        up = head.lora_B[name]
        # DoRA and the other variants, and a bias of B, are more than a low-rank product.
        if name in head.lora_variant or up.bias is not None:
            return None
        adapters.append(LowRank(head.lora_A[name], up, head.lora_dropout[name], head.scaling[name]))
    return base._replace(adapters=tuple(adapters))
