"""Memory that the kernels allocate and forget to write shows up as NaN in every test here."""

from importlib.util import find_spec

import pytest
import torch

# The kernels' tests also run on machines that have torch, triton and pytest and nothing else.
if find_spec("hypothesis") is None:
    collect_ignore = [
        "test_orpo_loss.py",
        "test_orpo_loss_memorised.py",
        "test_triton_properties.py",
    ]


@pytest.fixture(autouse=True, scope="module")
def _uninitialised_memory_is_nan():
    # In this mode torch.empty and its relatives come filled with NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
