"""Out of memory in a step: taken again in smaller rows, to the end that an unbroken run has."""

import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    GradientRecorder,
    of_the_loss,
    plain_rows,
    relative_error,
    tiny_model,
    trainer_for,
    with_lora,
)

from lite_orpo.allocator_failure import is_out_of_memory
from lite_orpo.errors import OutOfMemory
from lite_orpo.step.random_state import RandomState
from lite_orpo.step.row_room import RowRoom

PAIRS = 6
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
)


def make_trainer(folder, **settings):
    recorder = GradientRecorder()
    options = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 0.05,
        "max_tokens_per_row": 100,
        "callbacks": [recorder],
        "optim": "sgd",
        "max_grad_norm": 0.0,
        **settings,
    }
    dropout = options.pop("lora_dropout", 0.0)
    torch.manual_seed(0)
    model = with_lora(tiny_model(), lora_dropout=dropout)
    return trainer_for(model, folder, plain_rows(PAIRS * 3), **options), recorder


def fail_once(trainer, step, row, where):
    """Let the allocator fail at one row of one step: before its forward, or after its backward."""
    state = {"calls": 0, "failed": False}
    score, backward = trainer._score, trainer.accelerator.backward

    def due():
        is_there = trainer.state.global_step == step and state["calls"] == row
        return is_there and not state["failed"]

    def failing_score(*args, **kwargs):
        if where == "forward" and due():
            state["failed"] = True
            raise torch.OutOfMemoryError("injected")
        return score(*args, **kwargs)

    def failing_backward(loss, **kwargs):
        backward(loss, **kwargs)
        is_due = where == "backward" and due()
        state["calls"] += trainer.state.global_step == step
        if is_due:
            state["failed"] = True
            raise RuntimeError(CPU_ALLOCATOR)

    trainer._score = failing_score
    trainer.accelerator.backward = failing_backward
    return state


def outcome(trainer, recorder):
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
    logs = [log for log in trainer.state.log_history if "nll_loss" in log]
    return weights, recorder.steps, logs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return outcome(*make_trainer(tmp_path_factory.mktemp("unbroken")))


def test_the_steps_have_several_rows(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    entries, _ = trainer.get_batch_samples(
        iter([{"pairs": list(trainer.train_dataset)[:PAIRS]}]), 1, trainer.args.device
    )
    rows = entries[-1]["step"].rows
    assert len(rows) == 3
    assert any(row.pair_count > 1 for row in rows)


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_step_that_runs_out_of_memory_at_any_row_changes_nothing(
    row, where, sharing, unbroken, tmp_path, caplog
):
    tokens = {"on": 100, "off": 200}[sharing]
    trainer, recorder = make_trainer(tmp_path, prefix_sharing=sharing, max_tokens_per_row=tokens)
    state = fail_once(trainer, step=1, row=row, where=where)
    with caplog.at_level(logging.WARNING):
        weights, gradients, logs = outcome(trainer, recorder)
    assert state["failed"]
    assert trainer.state.global_step == 3
    for found, expected in zip(gradients, unbroken[1], strict=True):
        # Rows are cut differently after it: the same sums in another order, in fp32, and
        # weights that have moved by them.
        assert relative_error(found, expected) <= 2e-5
    assert relative_error(weights, unbroken[0]) <= 1e-6
    for log, expected in zip(logs, unbroken[2], strict=True):
        for key in of_the_loss(log):
            assert log[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 1
    assert "out of memory in a step with rows of up to" in said[0]
    assert "the pairs of a step stay the same" in said[0]


def test_with_dropout_it_is_bitwise_a_run_that_had_small_rows_from_that_step_on(tmp_path):
    """The random states are put back: nothing of the failed attempt's draws is seen."""
    broken, recorder = make_trainer(tmp_path, lora_dropout=0.5)
    fail_once(broken, step=0, row=1, where="backward")
    found = outcome(broken, recorder)
    assert broken.room.max_tokens < 100
    small, recorder = make_trainer(
        tmp_path, lora_dropout=0.5, max_tokens_per_row=broken.room.max_tokens
    )
    expected = outcome(small, recorder)
    for name in expected[0]:
        assert torch.equal(found[0][name], expected[0][name]), name


def test_a_single_pair_that_does_not_fit_stops_with_one_line(tmp_path):
    trainer, _ = make_trainer(tmp_path, max_tokens_per_row=2)
    fail_once(trainer, step=0, row=2, where="forward")
    with pytest.raises(OutOfMemory) as caught:
        trainer.train()
    text = str(caught.value)
    assert text.startswith("out of memory in a step with a single pair of")
    assert "lower max_length" in text
    assert "\n" not in text


def test_several_ranks_stop_with_one_line():
    room = RowRoom(100, "a step", ranks=2, remedy="")
    rows = [_row(2, 90)]
    with pytest.raises(OutOfMemory, match="one of 2 ranks, .*; lower max_tokens_per_row"):
        room.make(rows, _failing(99), lambda: rows)


class _row:  # noqa: N801
    def __init__(self, pairs, tokens):
        self.pair_count = pairs
        self.inputs = {"input_ids": torch.zeros(1, tokens)}


def _failing(times):
    left = [times]

    def attempt(rows):
        for _ in rows:
            break  # it fails at the first row
        if left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("injected")
        return "made"

    return attempt


def test_rows_are_halved_until_they_fit():
    room = RowRoom(4096, "a step", ranks=1, remedy="wait")
    planned = []

    def plan_again():
        planned.append(room.max_tokens)
        return [_row(2, room.max_tokens)]

    made, rows = room.make([_row(9, 3000)], _failing(3), plan_again)
    assert made == "made"
    assert planned == [1500, 750, 375]
    assert rows[0].inputs["input_ids"].numel() == 375


def test_a_single_pair_that_fails_beside_longer_rows_stops_at_once(caplog):
    room = RowRoom(4096, "a step", ranks=1, remedy="wait")
    with pytest.raises(OutOfMemory, match="single pair of 3,000 tokens in a row; .* wait,"):
        room.make([_row(1, 3000), _row(9, 2000)], _failing(9), list)
    assert room.max_tokens == 4096
    assert not caplog.records


def test_what_is_no_lack_of_memory_is_raised_as_it_is():
    room = RowRoom(4096, "a step", ranks=1, remedy="wait")

    def attempt(rows):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        room.make([_row(9, 3000)], attempt, list)
    assert room.max_tokens == 4096


def _caused_by(cause):
    error = KeyError("somewhere")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(CPU_ALLOCATOR), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (_caused_by(torch.OutOfMemoryError("injected")), True),
        (_caused_by(ValueError("shape")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lack_of_memory_is_told_from_other_errors(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_random_states_come_back():
    state = RandomState.now()
    first = random.random(), torch.rand(2)
    state.put_back()
    again = random.random(), torch.rand(2)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])


def test_the_probe_does_not_take_it_for_the_models_fault(tmp_path, monkeypatch):
    from lite_orpo.model import prefix_probe

    def failing(*args, **kwargs):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(prefix_probe, "_Probe", failing)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path)


def test_in_an_evaluation_only_the_evaluation_shrinks(tmp_path):
    trainer, _ = make_trainer(tmp_path, eval_dataset=plain_rows(7), prefix_sharing="on")
    expected = trainer.evaluate()
    trainer, _ = make_trainer(tmp_path, eval_dataset=plain_rows(7), prefix_sharing="on")
    score, calls = trainer._score, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return score(*args, **kwargs)

    trainer._score = failing
    found = trainer.evaluate()
    for key in expected:
        if "runtime" not in key and "per_second" not in key and "preparation" not in key:
            assert found[key] == pytest.approx(expected[key], rel=1e-6), key
    assert trainer._evaluation_room.max_tokens < 100
    assert trainer.room.max_tokens == 100


LIMITED = """
import resource, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from tiny_models import tiny_model, trainer_for, with_lora
rows = [{{"prompt": "p" * 200, "chosen": "c" * 20 + str(i), "rejected": "r" * 30 + str(i)}}
        for i in range(24)]
trainer = trainer_for(
    with_lora(tiny_model(max_position_embeddings=512, intermediate_size=4096)), {folder!r}, rows,
    per_device_train_batch_size=24, max_steps=2, max_tokens_per_row=8192, optim="sgd",
    prefix_sharing="on", learning_rate=0.01, max_grad_norm=0.0,
)
if sys.argv[1] == "limited":
    # What a step of rows of 8,192 tokens takes is over twice this (about 700 MiB).
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 450 * 2**20,) * 2)
trainer.train()
logs = [log for log in trainer.state.log_history if "nll_loss" in log]
print("RESULT", trainer.room.max_tokens, *(log["nll_loss"] for log in logs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_real_limit_is_survived(tmp_path):
    here = Path(__file__).resolve().parent
    code = LIMITED.format(paths=[str(here), str(here.parent / "data")], folder=str(tmp_path))
    found = {}
    for mode in ("free", "limited"):
        done = subprocess.run(
            [sys.executable, "-c", code, mode], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        found[mode] = [float(word) for word in line.split()[1:]]
        assert ("out of memory in a step" in done.stderr) is (mode == "limited")
    assert found["limited"][0] < found["free"][0] == 8192
    assert found["limited"][1:] == pytest.approx(found["free"][1:], rel=1e-5)
