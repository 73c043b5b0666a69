"""The opt-in search for block sizes: what it tries, takes and leaves alone. Times are given."""

import pytest
import torch
import triton
from cases import DEVICE, make_case
from test_triton_logprobs import compare_with_eager

from lite_orpo_kernels import autotune
from lite_orpo_kernels.launch_config import GPU_CLASSES, gpu_class, launch_config, override

SLIM = autotune.LogitsTile(64, 128, 32, 8, 2)
NARROW = autotune.RowsTile(64, 128, 32, 8, 2)


pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _fixed_configuration_afterwards():
    yield
    override(DEVICE, torch.float32, None)


def tune(timer):
    case = make_case(5, 12, 300, dtype=torch.float32, trainable=False, device=DEVICE)
    return autotune.autotune_launch_config(case.hidden, case.weight, case.targets, timer=timer)


def test_the_fastest_is_used_from_then_on():
    def timer(step):
        step()
        config = launch_config(DEVICE, torch.float32)
        return 9.0 - 3 * (config.logits == SLIM) - 2 * (config.rows == NARROW)

    trials = tune(timer)
    chosen = launch_config(DEVICE, torch.float32)
    assert (chosen.logits, chosen.rows) == (SLIM, NARROW)
    assert chosen.measured is not None
    assert trials[0].milliseconds == 4.0
    assert launch_config(DEVICE, torch.bfloat16) == gpu_class(DEVICE).half


def test_what_does_not_fit_the_card_is_passed_over():
    fixed = launch_config(DEVICE, torch.float32)

    def timer(_):
        if launch_config(DEVICE, torch.float32) != fixed:
            raise triton.runtime.errors.OutOfResources(200, 99, "shared memory")
        return 1.0

    trials = tune(timer)
    assert trials[0] == (fixed, 1.0) and trials[-1].milliseconds is None
    assert launch_config(DEVICE, torch.float32)[:2] == fixed[:2]


def test_a_card_on_which_nothing_runs_is_said_and_left_as_it_was():
    fixed = launch_config(DEVICE, torch.float32)

    def timer(_):
        raise triton.runtime.errors.OutOfResources(200, 99, "shared memory")

    with pytest.raises(RuntimeError, match="none of the known block sizes"):
        tune(timer)
    assert launch_config(DEVICE, torch.float32) == fixed


def test_a_failed_search_leaves_an_earlier_choice_alone():
    mine = launch_config(DEVICE, torch.float32)._replace(rows=NARROW, measured="by hand")
    override(DEVICE, torch.float32, mine)
    with pytest.raises(ZeroDivisionError):
        tune(lambda _: 1 / 0)
    assert launch_config(DEVICE, torch.float32) == mine


def test_no_candidate_crosses_a_block():
    seen = []
    tune(lambda _: seen.append(launch_config(DEVICE, torch.float32)) or 1.0)
    assert len(seen) > 10
    assert all(config.logits.block_v % config.rows.block_c == 0 for config in seen)


@pytest.mark.parametrize("name", sorted({"sm_80", "sm_90", "default"}))
def test_every_configuration_gives_the_same_numbers(name):
    # The interpreter runs the tiles of other cards as well as any.
    case = make_case(70, 40, 300, dtype=torch.float32, trainable=False, device=DEVICE)
    override(DEVICE, torch.float32, GPU_CLASSES[name].half)
    compare_with_eager(case, torch.float32)
