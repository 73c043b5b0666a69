"""The GPU benchmark runs here, on a CPU and tiny shapes, so that paid time is not spent on it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Scripts in a folder are no package: they find each other as they do when run.
sys.path.insert(0, str(BENCHMARKS))
import gpu_contest  # noqa: E402
import gpu_peers  # noqa: E402
import head_gpu  # noqa: E402
import peaked_activations  # noqa: E402

OURS = ("mm", "triton", "chunked", "eager", "triton_no_grad", "eager_no_grad")
PEERS = ("torch_chunked", "trl_chunked", "liger_flce", "cce")
CPU = torch.device("cpu")
EFFORT = gpu_contest.Effort(rounds=2, calls=2, warm_up=0)


def run(tmp_path, *options):
    """What the script prints and writes; its folder is not this one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    file = tmp_path / "figures.json"
    script = str(BENCHMARKS / "head_gpu.py")
    done = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--json", str(file), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run(tmp_path_factory.mktemp("tiny"), "--shapes", "tiny")


@pytest.fixture(scope="module")
def inputs():
    return peaked_activations.synthetic(24, 32, 200, CPU)


def test_every_method_at_hand_is_in_the_table_and_has_a_time(tiny):
    printed, document = tiny
    for case in document["results"]["heads"]["tiny"].values():
        lines = case["methods"]
        assert set(OURS) <= set(lines)
        assert set(PEERS) <= set(lines) | set(case["left_out"])
        if importlib.util.find_spec("trl") is not None:
            assert "trl_chunked" in lines
        assert ("torch_chunked" in lines) == hasattr(F, "linear_cross_entropy")
        for line in lines.values():
            assert line["problem"] is None and line["ms"]["median"] > 0
            assert f"| {line['title']} " in printed
        for peer in case["left_out"]:
            assert f"Left out: {peer}: " in printed
        assert "SYNTHETIC" in printed and "deciles of 1 - p" in printed


def test_our_gradient_is_no_worse_than_twice_eagers(tiny):
    _, document = tiny
    for case in document["results"]["heads"]["tiny"].values():
        error = {key: line.get("errors") for key, line in case["methods"].items()}
        for measure in ("gradient", "worst_row", "output"):
            assert error["triton"][measure] <= 2 * error["eager"][measure] + 1e-2


def test_workspaces_and_the_whole_loss_are_measured_too(tiny):
    _, document = tiny
    workspaces = document["results"]["workspaces"]["tiny"]
    assert set(workspaces) == {"mm", "32", "64", "128", "256"}
    losses = document["results"]["losses"]["tiny"]
    assert "liger_orpo" in {**losses["methods"], **losses["left_out"]}
    for line in (*workspaces.values(), *losses["methods"].values()):
        assert line["problem"] is None and line["over_mm"]["median"] > 0


def test_figures_say_where_they_come_from(tiny):
    _, document = tiny
    source = document["provenance"]
    assert {"commit", "kernels_sha256", "date", "device", "torch_cuda"} <= set(source)
    assert {"torch", "triton", "liger-kernel"} <= set(source["versions"])
    assert not any(str(BENCHMARKS) in str(value) for value in source.values())


def test_tiles_are_tried_on_activations_from_a_file(tmp_path, inputs):
    file = tmp_path / "activations.pt"
    torch.save({**inputs._asdict(), "label": "a test"}, file)
    printed, document = run(
        tmp_path, "--tune", "--candidates", "2", "--rows", "16", "--activations", str(file)
    )
    found = document["results"]["tiles"]["activations"]
    for stage in ("logits", "rows"):
        assert len(found[stage]["tried"]) == 3
        for label in found[stage]["tried"]:
            assert found[stage]["methods"][label]["ms"]["median"] > 0
    assert "(128, 128, 64, 8, 3), no_grad" in found["logits"]["methods"]
    assert printed.count("Fastest: ") == 2


def test_a_method_that_is_wrong_or_fails_is_named_and_has_no_time(inputs):
    def detached(hidden, weight, targets):
        return gpu_peers.PEERS["eager"].head(hidden.detach(), weight, targets)

    def halved(hidden, weight, targets):
        right = gpu_peers.PEERS["eager"].head(hidden, weight, targets)
        return right.detach() + (right - right.detach()) / 2

    def nan(hidden, weight, targets):
        return hidden.sum(dim=1).float() * torch.nan

    heads = {"detached": detached, "halved": halved, "nan": nan}
    methods = [gpu_peers.Method(name, name, head) for name, head in heads.items()]
    exact = peaked_activations.exact_logprobs(inputs)
    lines = gpu_contest.contest([gpu_peers.BARE_PRODUCT, *methods], inputs, exact, EFFORT)
    assert "ms" in lines.pop("mm")
    assert all("ms" not in line for line in lines.values())
    assert "RuntimeError" in lines["detached"]["problem"]
    assert lines["halved"]["problem"].startswith("WRONG: output off by 0.")
    assert "gradient off by 50." in lines["halved"]["problem"]
    assert lines["nan"]["problem"].startswith("WRONG")


def test_what_does_not_fit_is_not_tried(inputs, monkeypatch):
    monkeypatch.setattr(gpu_contest.Clock, "free_mib", lambda clock: 0.01)
    eager = gpu_peers.Method("eager", "eager", gpu_peers.PEERS["eager"].head, bytes_per_logit=10)
    exact = peaked_activations.exact_logprobs(inputs)
    lines = gpu_contest.contest([gpu_peers.BARE_PRODUCT, eager], inputs, exact, EFFORT)
    assert "are free" in lines["eager"]["problem"] and "ms" not in lines["eager"]


def test_a_gpu_is_timed_by_events_and_asked_for_its_memory(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1.5
            self.at = Event.clock

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12 * 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**20, 9 * 2**20))
    clock, calls = gpu_contest.Clock(torch.device("cuda")), []
    assert clock.takes(lambda: calls.append(1), 3) == [1.5] * 3
    assert clock.extra_mib(lambda: calls.append(1)) == 7.0
    assert clock.free_mib() == 3.0
    assert clock.host_ms(lambda: calls.append(1)) >= 0 and len(calls) > 4


def test_the_memory_check_says_by_how_much():
    check = head_gpu.memory_check
    assert "pass, 2.0 MiB below" in check({"extra_mib": 98.0}, 4096, 2048)
    assert "FAIL, 60.0 MiB above" in check({"extra_mib": 256.0}, 8192, 4096)
    assert "not measured" in check({"problem": "failed"}, 1, 1)


def test_exact_gradient_is_the_one_of_autograd_in_fp64(inputs):
    hidden = inputs.hidden.double().requires_grad_()
    logits = hidden @ inputs.weight.double().t()
    logps = logits.log_softmax(dim=1).gather(1, inputs.targets.unsqueeze(1)).squeeze(1)
    logps.sum().backward()
    exact = peaked_activations.exact_logprobs(inputs)
    torch.testing.assert_close(exact.output, logps.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact.gradient, hidden.grad, rtol=1e-8, atol=1e-10)


def test_synthetic_targets_range_from_unlikely_to_memorised():
    exact = peaked_activations.exact_logprobs(peaked_activations.synthetic(256, 64, 1000, CPU))
    described = peaked_activations.describe(exact.miss)
    assert described["deciles_of_one_minus_p"][1] < 1e-3
    assert described["deciles_of_one_minus_p"][9] > 0.5
    assert sum(described["share_by_one_minus_p"].values()) == pytest.approx(1)


def test_a_file_with_something_else_is_refused(tmp_path, inputs):
    file = tmp_path / "other.pt"
    torch.save({"hidden": inputs.hidden}, file)
    with pytest.raises(ValueError, match="other.pt must hold"):
        peaked_activations.from_file(file, CPU)
    torch.save({**inputs._asdict(), "targets": inputs.targets[1:]}, file)
    with pytest.raises(ValueError, match="do not fit"):
        peaked_activations.from_file(file, CPU)
