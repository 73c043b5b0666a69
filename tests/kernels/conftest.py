"""Memory that the kernels allocate and forget to write shows up as NaN in every test here."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _uninitialised_memory_is_nan():
    # In this mode torch.empty and its relatives come filled with NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
