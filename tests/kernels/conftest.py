"""Settings of the kernels' tests: where Triton runs, and memory that nobody wrote."""

import os

import pytest
import torch

# Without a GPU the Triton kernels themselves run in Triton's interpreter. It must be chosen
# before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _uninitialised_memory_is_nan():
    # In this mode torch.empty and its relatives come filled with NaN: what a kernel allocates
    # and forgets to write shows up in every test here.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
