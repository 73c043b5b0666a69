"""`lite-orpo compare`: real runs on the demo model, what is written, stopping and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lite_orpo.checkpoint.manifest import why_incomplete
from lite_orpo.cli.main import run
from lite_orpo.comparison.runs import Run, cost_of, digest_of_files
from lite_orpo.errors import ConfigError
from lite_orpo.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
SAME = [
    "max_steps=6",
    "per_device_train_batch_size=2",
    "gradient_accumulation_steps=1",
    "logging_steps=1",
    "eval_strategy=steps",
    "eval_steps=3",
    "sample_prompts=1",
    "sample_max_new_tokens=8",
    "save_plots=false",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = (ROOT / "examples/demo_data/train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:20]))
    (folder / "held_out.jsonl").write_text("\n".join(lines[20:36]))
    return [f"dataset_name={folder}/train.jsonl", f"eval_dataset_name={folder}/held_out.jsonl"]


def command(pairs, output, *words):
    start = [sys.executable, "-m", "lite_orpo.cli.main", "compare", "examples/demo.yaml"]
    given = {word.split("=")[0] for word in words}
    same = [word for word in [*SAME, *pairs] if word.split("=")[0] not in given]
    return [*start, *words, *same, "--output", str(output)]


@pytest.fixture
def compare(pairs, monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def call(output, *words):
        monkeypatch.setattr(sys, "argv", ["lite-orpo", *command(pairs, output, *words)[3:]])
        with pytest.raises(SystemExit) as ended:
            run()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    """Two losses compared; the folder and what was printed."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    words = command(pairs, folder, "--loss-type", "orpo,dpo")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def results(folder):
    return json.loads((folder / "compare.json").read_text())


def adapter(folder, name):
    return load_file(folder / "runs" / name / "adapter_model.safetensors")


def test_base_and_runs_are_measured_alike_and_shown_in_one_table(made):
    folder, printed = made
    found = results(folder)
    assert [line["label"] for line in found["results"]] == ["base model", "orpo", "dpo"]
    assert found["pairs"] == 16
    for line in found["results"]:
        assert 0 <= line["figures"]["accuracy"]["value"] <= 1
        assert line["figures"]["nll_chosen"]["low"] < line["figures"]["nll_chosen"]["high"]
        assert len(line["answers"]) == 1
    base, *runs = found["results"]
    assert base["cost"] is None
    assert all(run["cost"]["seconds"] > 0 for run in runs)
    assert all(run["cost"]["tokens_per_second"] > 0 for run in runs)
    for word in ("accuracy", "margin", "log odds", "NLL", "time", "peak", "tokens", "orpo", "dpo"):
        assert word in printed
    assert "16 pairs" in printed


def test_the_picture_is_there(made):
    folder, _ = made
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_all_runs_have_the_same_pairs_order_and_budget(made):
    folder, _ = made
    orpo, dpo = (
        json.loads((folder / "runs" / name / "fingerprint.json").read_text())
        for name in ("orpo", "dpo")
    )
    assert orpo["loss settings"] != dpo["loss settings"]
    for part in ("base weights", "data", "adapter", "chat template", "pairs of a step"):
        assert orpo[part] == dpo[part]
    lines = [read_metrics(folder / "runs" / name / "metrics.jsonl") for name in ("orpo", "dpo")]
    # The first step sees the same pairs with the same weights: only what is reported differs.
    first = [next(line for line in run if line["step"] == 1) for run in lines]
    assert first[0]["log_odds_chosen"] == pytest.approx(first[1]["log_odds_chosen"], rel=1e-5)
    assert [line["step"] for line in lines[0] if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines[1] if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_reference_counts_in_the_time_of_the_loss_that_needs_it(made):
    folder, _ = made
    lines = read_metrics(folder / "runs" / "dpo" / "metrics.jsonl")
    (last,) = [line for line in lines if "train_runtime" in line]
    assert last["lite_orpo/reference_seconds"] > 0
    cost = results(folder)["results"][2]["cost"]
    assert cost["seconds"] == pytest.approx(
        last["train_runtime"] + last["lite_orpo/reference_seconds"]
    )
    assert len(list((folder / "reference").glob("reference_logps-*.safetensors"))) == 2


def test_runs_that_are_there_are_not_made_again(made, compare):
    folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.safetensors")}
    code, printed, error = compare(folder, "--loss-type", "orpo,dpo")
    assert code == 0, error
    assert "2 of 2 runs are in" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_other_runs_is_refused_in_one_line(made, compare):
    folder, _ = made
    code, _, error = compare(folder, "--loss-type", "orpo,dpo", "max_steps=7")
    assert code == 2
    assert "holds a run with other settings or other pairs; give --output another folder" in error
    assert len(error.strip().splitlines()) == 1


def test_a_run_of_other_pairs_in_the_same_file_is_not_taken_for_this_one(tmp_path):
    pairs = tmp_path / "train.jsonl"
    pairs.write_text("first")

    def run_of_today():
        found = digest_of_files((str(pairs), None, "somebody/pairs", str(tmp_path)))
        return Run(tmp_path / "runs" / "orpo", ROOT / "examples/demo.yaml", {}, found)

    run_of_today().begin()
    assert not run_of_today().is_finished()
    run_of_today().finish()
    assert run_of_today().is_finished()
    pairs.write_text("other")
    with pytest.raises(ConfigError, match="other settings or other pairs"):
        run_of_today().is_finished()


def test_old_names_are_told_of_once_not_once_a_run(made, compare):
    folder, _ = made
    code, printed, _ = compare(folder, "--loss-type", "orpo,dpo", "use_mps_device=false")
    assert code == 2  # other settings than those of the runs that are there
    assert printed.count("names of earlier versions were translated") == 1


def test_a_base_in_four_bits_is_measured_as_the_runs_have_it(compare, tmp_path):
    code, printed, error = compare(
        tmp_path / "out", "--loss-type", "orpo,sft", "load_in_4bit=true", "learning_rate=0",
        "max_steps=1", "sample_at_evaluations=true", "push_to_hub=true",
    )  # fmt: skip
    assert code == 0, error + printed
    base, *runs = results(tmp_path / "out")["results"]
    # Nothing is learnt at a rate of zero: each run is its base, in the same 4 bits.
    for line in runs:
        assert line["figures"]["nll_chosen"] == pytest.approx(base["figures"]["nll_chosen"])
    assert "sft passes no rejected answers" in " ".join(printed.split())


def test_ctrl_c_while_the_runs_are_measured_says_how_to_go_on(made, compare, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lite_orpo.cli.compare._results", stopped)
    code, printed, _ = compare(made[0], "--loss-type", "orpo,dpo")
    assert code == 130
    assert "Go on with the same command:" in printed


def test_the_time_of_a_run_is_that_of_all_its_parts():
    lines = [
        {"step": 3, "lite_orpo/tokens_per_second": 100.0},
        {"step": 3, "train_runtime": 4.0, "lite_orpo/reference_seconds": 2.0},
        {"step": 6, "train_runtime": 3.0, "lite_orpo/reference_seconds": 2.0},
    ]
    assert cost_of(lines).seconds == 9.0


def test_a_run_without_a_result_is_told_and_costs_no_other_its_place(compare, tmp_path):
    code, printed, _ = compare(tmp_path / "out", "lora_r=4,0", "max_steps=1", "sample_prompts=0")
    assert code == 1
    found = results(tmp_path / "out")["results"]
    assert found[1]["problem"] is None
    assert "`r` should be a positive integer" in found[2]["problem"]
    assert found[2]["figures"] == {}
    assert "positive integer" in " ".join(printed.split())


def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(
    made, pairs, compare, tmp_path
):
    folder = tmp_path / "out"
    log = folder / "runs" / "orpo.log"
    words = command(pairs, folder, "--loss-type", "orpo,dpo")
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (log.exists() and "step 1/6" in log.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Go on with the same command" in printed
    (checkpoint,) = (folder / "runs" / "orpo").glob("checkpoint-*")
    assert why_incomplete(checkpoint) is None
    code, _, error = compare(folder, "--loss-type", "orpo,dpo")
    assert code == 0, error
    straight = adapter(made[0], "orpo")
    resumed = adapter(folder, "orpo")
    assert all((straight[name] == resumed[name]).all() for name in straight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss-type", "orpo"], "nothing to compare it with"),
        (["--loss-type", "orpo,dpo", "eval_dataset_name=null"], "needs held-out pairs"),
        (["--loss-type", "orpo,dpo", "dataset_name=gone.jsonl"], "gone.jsonl"),
        (["--loss-type", "orpo,dpo", "beta=-1"], "beta must be a number and not negative"),
        (["--loss-type", "orpo,dpo", "lora_rank=4"], "unknown key lora_rank"),
        (["--loss-type", "orpo,sft", "resume_from_checkpoint=true"], "goes on by itself"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(words, message, compare, tmp_path):
    code, _, error = compare(tmp_path / "out", *words)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "runs").exists()
