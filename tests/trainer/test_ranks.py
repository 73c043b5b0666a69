"""Two ranks take the step that one process takes, whatever is left over for the last batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_scenarios
import torch
from filelock import FileLock
from ranks_scenarios import SCENARIOS
from tiny_models import of_the_loss, relative_error, whole_relative_error

RANKS = 2


def launch(folder: Path) -> None:
    """Run this folder's scenarios in two ranks; each leaves its results in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(Path(ranks_scenarios.__file__)), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process, then of each rank; made once for all scenarios and all pytest workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "alone.pt").is_file():
            launch(folder)
            torch.save(ranks_scenarios.run_all(folder / "one", 1), folder / "alone.pt")
    names = ["alone", *(f"rank{rank}" for rank in range(RANKS))]
    return [torch.load(folder / f"{name}.pt") for name in names]


@pytest.fixture
def alone(results):
    return results[0]


@pytest.fixture
def spread(results):
    return results[1:]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_make_the_gradient_of_one_process(name, alone, spread):
    expected = alone[name]["gradients"]
    for rank in range(RANKS):
        found = spread[rank][name]["gradients"]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            # The same sums in another order, in fp32 (2e-6 on the worst parameter, by CPU and by
            # how a row lies in memory); a repeated pair that counts would change whole digits.
            assert relative_error(ours, theirs) <= 5e-6


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_log_the_figures_of_one_process(name, alone, spread):
    expected = alone[name]["logs"]
    for rank in range(RANKS):
        found = spread[rank][name]["logs"]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key in of_the_loss(theirs):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


def test_packed_and_padded_rows_take_the_same_step_on_any_number_of_ranks(alone, spread):
    expected = alone["padded"]["gradients"]
    for found in (alone["many_rows"], spread[0]["many_rows"], spread[0]["padded"]):
        for ours, theirs in zip(found["gradients"], expected, strict=True):
            assert whole_relative_error(ours, theirs) <= 1e-6


def test_ranks_of_a_sharded_model_pass_equally_many_rows_and_make_the_same_gradient(alone, spread):
    expected = alone["sharded"]
    assert expected["rows"] == 6
    for rank in range(RANKS):
        found = spread[rank]["sharded"]
        assert found["rows"] == 4  # of the second rank, two are there for the collectives alone
        assert relative_error(found["gradients"], expected["gradients"]) <= 5e-6
    # Each rank's loss is its share, scaled so that the mean over ranks is the whole.
    losses = [spread[rank]["sharded"]["loss"] for rank in range(RANKS)]
    assert sum(losses) / RANKS == pytest.approx(expected["loss"], rel=1e-6)


def test_ranks_decide_alike_whether_to_pack(alone, spread):
    assert alone["decisions"]["auto"].startswith("packed")
    assert alone["decisions"]["on"] == "no error"
    for rank in range(RANKS):
        found = spread[rank]["decisions"]
        assert found["auto"].startswith("separate, padded: this one cannot")
        assert "cannot: this one cannot; set it to auto or off" in found["on"]


def test_two_ranks_evaluate_an_odd_number_of_pairs_as_one_process_does(alone, spread):
    for rank in range(RANKS):
        assert spread[rank]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-6)


def test_a_run_resumed_on_two_ranks_ends_where_the_straight_one_does(spread):
    for rank in range(RANKS):
        straight, resumed = spread[rank]["resume"]["straight"], spread[rank]["resume"]["resumed"]
        assert straight.keys() == resumed.keys()
        for key in straight:
            assert torch.equal(straight[key], resumed[key]), key


def test_no_rank_adds_a_training_state_to_a_checkpoint_of_the_model_alone(alone, spread):
    for rank in range(RANKS):
        assert spread[rank]["model_alone"] == alone["model_alone"]
    assert "adapter_model.safetensors" in alone["model_alone"]
    assert not any("random" in name for name in alone["model_alone"])
