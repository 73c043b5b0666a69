"""Telling an allocator that gave up from every other error."""

import torch

_SIGNS = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory",
    "out of memory",  # CUDA, MPS, XPU and NPU, as a plain RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocator gave up, or one did that the error was raised from."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__
    return False
