"""What a pass through a model holds in memory, found by running it on tensors without data.

The model's own code runs under PyTorch's fake tensors: every operation gives shapes and storages
of the true sizes, none is computed. Storages are counted from birth to death, so activation
checkpointing, adapters, attention paths and autocast are counted as they are, whatever the
architecture. Fake tensors are on the CPU; a GPU's attention keeps nearly the same.

Legend: T tokens of a row, MiB = 2^20 bytes.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .host_memory import COPIES_UNDER_WAY, OFFLOADED_FROM
from .tree_segments import forget_layouts


class PassMemory(NamedTuple):
    """Bytes beyond the model's own and its gradients, over one forward and backward pass."""

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
        self._sizes: dict[int, int] = {}
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
        if key in inputs or key in self._sizes:
            return  # a view, or written in place
        storage = made.untyped_storage()
        weakref.finalize(storage, self.leave_out, key)
        if self._makes_on_host:
            self._sizes[key] = 0
            self.on_host += storage.nbytes()
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def leave_out(self, key: int) -> None:
        """Count a storage no longer: it is freed, or belongs to something else from now on."""
        self.live -= self._sizes.pop(key, 0)

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


def trace_pass(
    run: Callable[[], Tensor], trained: Iterable[nn.Parameter], *, offloads: bool = False
) -> PassMemory:
    """Count one forward and backward pass.

    Args:
        run: the forward pass, within `fake_weights`.
        trained: the parameters that get gradients; those are not counted, they stay.
        offloads: whether what the backward pass needs is moved to the host in between.

    Returns:
        Bytes that the pass holds. The output and its gradient are counted in.
    """
    with _LiveStorages() as storages:

        def keeps(parameter: Tensor) -> None:
            assert parameter.grad is not None
            storages.leave_out(_storage_of(parameter.grad))

        hooks = [p.register_post_accumulate_grad_hook(keeps) for p in trained]
        with storages.offloading() if offloads else nullcontext():
            hidden = run()
        kept = storages.live
        hidden.backward(torch.ones_like(hidden))
        for hook in hooks:
            hook.remove()
        return PassMemory(kept, storages.peak, storages.on_host)
