"""What `orpo_loss` and `fused_orpo_loss` refuse, before any expensive work."""

import pytest
import torch

from lite_orpo_kernels import fused_orpo_loss, orpo_loss


@pytest.mark.parametrize("function", ["orpo_loss", "fused_orpo_loss"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"completion_ids": torch.zeros(21, dtype=torch.int64)}, "21", id="ids-short"),
        pytest.param({"completion_ids": torch.tensor([0])}, r"\(1,\)", id="ids-one"),
        pytest.param({"nll_mask": torch.ones(23, dtype=torch.bool)}, "23", id="mask-long"),
        pytest.param({"nll_mask": torch.ones(1, dtype=torch.bool)}, r"\(1,\)", id="mask-one"),
        pytest.param({"pair_count": -1}, "pair_count.*-1", id="negative-pairs"),
        pytest.param({"pair_count": 2}, "completion id 5 belongs to no pair", id="too-few-pairs"),
    ],
)
def test_user_errors_name_what_is_wrong(function, change, words):
    arguments = {
        "completion_ids": torch.arange(22) % 6,
        "nll_mask": torch.ones(22, dtype=torch.bool),
        "pair_count": 3,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        if function == "fused_orpo_loss":
            targets = torch.zeros(22, dtype=torch.int64)
            fused_orpo_loss(torch.zeros(22, 4), torch.zeros(9, 4), targets, **arguments)
        else:
            orpo_loss(torch.zeros(22), **arguments)


def test_batched_logps_are_refused():
    with pytest.raises(ValueError, match=r"\[M\]"):
        orpo_loss(
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, 3, dtype=torch.bool),
            pair_count=1,
        )
