"""What a pass through the trunk holds in memory, found by running it on tensors without data.

The model's own code runs under PyTorch's fake tensors: every operation gives shapes and storages
of the true sizes, none is computed. Storages are counted from birth to death, so activation
checkpointing, adapters, attention paths and autocast are counted as they are, whatever the
architecture. Fake tensors are on the CPU; a GPU's attention keeps nearly the same.

Legend: T tokens of a row, MiB = 2^20 bytes.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .host_memory import COPIES_UNDER_WAY, OFFLOADED_FROM
from .tree_segments import forget_layouts


class TrunkMemory(NamedTuple):
    """Bytes beyond the model's own, over one forward and backward pass of the trunk."""

    kept: int
    """Held between forward and backward: what the backward pass needs."""
    peak: int
    """Most at any moment of either."""
    on_host: int
    """Held between forward and backward, but moved to the host's memory."""


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.on_host = 0
        self._known: set[int] = set()
        self._makes_on_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {_storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made, inputs)
        return result

    def _count(self, made: Tensor, inputs: set[int]) -> None:
        key = _storage_of(made)
        if key in inputs or key in self._known:
            return  # a view, or written in place
        storage = made.untyped_storage()
        size = storage.nbytes()
        self._known.add(key)
        if self._makes_on_host:
            self.on_host += size
            weakref.finalize(storage, self._known.discard, key)
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)

    def offloading(self) -> saved_tensors_hooks:
        """Count what the backward pass needs as moved to the host, and back when it is needed."""
        under_way: deque[Tensor] = deque(maxlen=COPIES_UNDER_WAY)

        def pack(tensor: Tensor) -> Tensor:
            if isinstance(tensor, nn.Parameter) or tensor.nbytes < OFFLOADED_FROM:
                return tensor
            under_way.append(tensor)
            self._makes_on_host = True
            try:
                return tensor.detach().clone()
            finally:
                self._makes_on_host = False

        def unpack(tensor: Tensor) -> Tensor:
            is_there = isinstance(tensor, nn.Parameter) or tensor.nbytes < OFFLOADED_FROM
            return tensor if is_there else tensor.clone()

        return saved_tensors_hooks(pack, unpack)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def fake_weights(model: nn.Module) -> Iterator[None]:
    """Within this context a model on the meta device computes on fake tensors of the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Any] = {}
    forget_layouts()
    try:
        with FakeTensorMode():
            for module in model.modules():
                for store in (module._parameters, module._buffers):
                    for name, value in list(store.items()):
                        if value is not None:
                            store[name] = _fake_like(value, made)
            yield
    finally:
        forget_layouts()


def _fake_like(value: Any, made: dict[int, Any]) -> Any:
    if id(value) not in made:  # tied weights stay tied
        fake = torch.empty(value.shape, dtype=value.dtype)
        if isinstance(value, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=value.requires_grad)
        made[id(value)] = (fake, value)  # the original is kept, so that its id is not used again
    return made[id(value)][0]


def trace_trunk(run: Callable[[], Tensor], *, offloads: bool = False) -> TrunkMemory:
    """Count one forward and backward pass.

    Args:
        run: the forward pass, within `fake_weights`; returns what goes into the head.
        offloads: whether what the backward pass needs is moved to the host in between.

    Returns:
        Bytes that the pass holds. The output and its gradient are counted in.
    """
    with _LiveStorages() as storages:
        with storages.offloading() if offloads else nullcontext():
            hidden = run()
        kept = storages.live
        hidden.backward(torch.ones_like(hidden))
        return TrunkMemory(kept, storages.peak, storages.on_host)
