"""How functions become torch operators: one node each to torch.compile, opaque to its tracing.

`torch.library.custom_op` would do the same in fewer lines, but loads torch's compiler at the first
call: some 100 MiB and seconds that a laptop's process has no use for.
"""

from collections.abc import Callable
from typing import Any

import torch

# A copy of this package under another name must not meet the first one's operators.
NAMESPACE = (__package__ or "lite_orpo_kernels").replace(".", "_")
_library = torch.library.Library(NAMESPACE, "DEF")


def register_operator(
    name: str, function: Callable[..., Any], shapes: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Make a function of annotated arguments an operator on every device.

    Args:
        name: of the operator, within this package.
        function: takes and returns tensors (and plain numbers, strings, lists); its results
            share no memory with its arguments.
        shapes: takes the same and returns empty tensors of the results' shapes and dtypes.

    Returns:
        What to call.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload
