"""What an optimiser keeps for each weight; whole plans are in `test_memory_plan.py`."""

import pytest

from lite_orpo.memory.items import state_bytes


@pytest.mark.parametrize(
    ("optim", "of_fp32", "of_bf16"),
    [
        ("adamw_torch", 8, 4),
        ("adamw_torch_fused", 8, 4),
        ("paged_adamw_32bit", 8, 8),
        ("paged_adamw_8bit", 2, 2),
        ("adamw_bnb_8bit", 2, 2),
        ("adamw_torch_4bit", 1, 1),
        ("lion_8bit", 1, 1),
        ("ademamix", 12, 6),
        ("paged_ademamix_8bit", 3, 3),
        ("rmsprop", 4, 2),
        ("sgd", 0, 0),
        ("lomo", 0, 0),
    ],
)
def test_optimiser_states_are_in_the_weights_dtype_or_bitsandbytes(optim, of_fp32, of_bf16):
    assert (state_bytes(optim, 4), state_bytes(optim, 2)) == (of_fp32, of_bf16)
