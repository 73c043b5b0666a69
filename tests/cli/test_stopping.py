"""A run that is stopped ends with a complete checkpoint and says how it goes on; then it does."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lite_orpo.cli.train as train_command
from lite_orpo import interruption
from lite_orpo.checkpoint import staging
from lite_orpo.checkpoint.manifest import why_incomplete
from lite_orpo.cli.overrides import split_arguments
from lite_orpo.report.metrics_file import MetricsFile, read_metrics
from lite_orpo.report.progress import TrainingProgress


@pytest.fixture
def unbroken(train):
    code, _, folder = train()
    assert code == 0
    return load_file(folder / "adapter_model.safetensors")


def send_at(monkeypatch, owner, name, number, *, when=lambda *arguments, **options: True):
    """Send this process a signal at the first call that `when` picks."""
    own, left = getattr(owner, name), [1]

    def wrapped(*arguments, **options):
        if left and when(*arguments, **options):
            left.clear()
            signal.raise_signal(number)
        return own(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


def at_step(step):
    return lambda self, args, state, control, **_: state.global_step == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_bit_for_bit(
    number, train, unbroken, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "stopped"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        send_at(patched, MetricsFile, "on_log", number, when=at_step(2))
        code, _, _ = train(f"output_dir={folder}")
    assert code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    (checkpoint,) = folder.glob("checkpoint-*")
    assert why_incomplete(checkpoint) is None
    assert not (folder / "adapter_model.safetensors").exists()
    code, error, _ = train(f"output_dir={folder}", "--resume")
    assert code == 0, error
    found = load_file(folder / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP on Windows")
def test_a_terminal_that_is_closed_costs_no_step_and_nohup_stays(train, tmp_path, monkeypatch):
    own = MetricsFile.on_log

    def twice(*arguments, **options):
        if arguments[2].global_step == 2:
            for _ in range(2):  # from the terminal, and from the shell
                signal.raise_signal(signal.SIGHUP)
        return own(*arguments, **options)

    monkeypatch.setattr(MetricsFile, "on_log", twice)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train()[0] == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert train(f"output_dir={tmp_path / 'stopped'}")[0] == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert why_incomplete(checkpoint) is None


def test_a_second_signal_stops_at_once(train, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    own = MetricsFile.on_log

    def twice(*arguments, **options):
        if arguments[2].global_step == 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)  # its handler runs before this returns
        return own(*arguments, **options)

    monkeypatch.setattr(MetricsFile, "on_log", twice)
    assert train(f"output_dir={folder}")[0] == 130
    assert not list(folder.glob("checkpoint-*"))


def test_an_evaluation_is_cut_and_the_step_before_it_saved(train, unbroken, tmp_path, monkeypatch):
    words = (f"output_dir={tmp_path / 'stopped'}", "eval_strategy=steps", "eval_steps=2")
    with monkeypatch.context() as patched:
        send_at(patched, TrainingProgress, "on_prediction_step", signal.SIGINT, when=at_step(2))
        assert train(*words)[0] == 130
    assert why_incomplete(tmp_path / "stopped" / "checkpoint-2") is None
    assert train(*words, "--resume")[0] == 0
    found = load_file(tmp_path / "stopped" / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


def test_a_stop_in_mid_epoch_is_exact_with_evaluations_at_its_end(train, tmp_path, monkeypatch):
    words = ("eval_strategy=epoch", "lora_dropout=0.3", "max_steps=6", "save_strategy=epoch")
    assert train(*words)[0] == 0
    unbroken = load_file(tmp_path / "out" / "adapter_model.safetensors")
    words = (f"output_dir={tmp_path / 'stopped'}", *words)
    with monkeypatch.context() as patched:
        send_at(patched, MetricsFile, "on_log", signal.SIGTERM, when=at_step(3))
        assert train(*words)[0] == 143
    assert train(*words, "--resume")[0] == 0
    found = load_file(tmp_path / "stopped" / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


def test_the_checkpoint_that_is_announced_stays_beside_the_best_one(train, tmp_path, monkeypatch):
    words = ("eval_strategy=steps", "eval_steps=1", "save_strategy=steps", "save_steps=1")
    words += ("load_best_model_at_end=true", "save_total_limit=1", "learning_rate=100")
    send_at(monkeypatch, MetricsFile, "on_log", signal.SIGINT, when=at_step(2))
    assert train(f"output_dir={tmp_path / 'stopped'}", *words)[0] == 130
    assert why_incomplete(tmp_path / "stopped" / "checkpoint-3") is None


@pytest.mark.parametrize("moment", ["last step", "last evaluation"])
def test_a_signal_at_the_very_end_costs_no_adapter(moment, train, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    owner, name = (MetricsFile, "on_log")
    if moment == "last evaluation":
        owner, name = (TrainingProgress, "on_prediction_step")
    send_at(monkeypatch, owner, name, signal.SIGINT, when=at_step(4))
    code, _, _ = train(f"output_dir={folder}")
    assert code == 130
    found = load_file(folder / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(train, tmp_path):
    words = ("save_strategy=steps", "save_steps=1")
    assert train(*words)[0] == 0
    folder = tmp_path / "out"
    again = ("--resume", *words, "max_steps=6")
    assert train(f"resume_from_checkpoint={folder}/checkpoint-2", *words)[0] == 0
    assert (folder / "checkpoint-4.superseded").is_dir()
    assert train(*again)[0] == 0
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_both_ways_to_go_on_at_once_are_refused(train):
    code, error, _ = train("--resume", "resume_from_checkpoint=x")
    assert code == 2
    assert "--resume and resume_from_checkpoint are both given" in error


def test_another_runs_checkpoint_is_not_gone_on_with_in_a_folder_that_holds_a_run(train, tmp_path):
    assert train("save_strategy=steps", "save_steps=2")[0] == 0
    other = f"output_dir={tmp_path / 'other'}"
    assert train(other)[0] == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    code, error, _ = train(other, f"resume_from_checkpoint={checkpoint}")
    assert code == 2
    assert "holds an earlier run" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_save_that_is_under_way_is_finished(number, train, tmp_path, monkeypatch):
    words = (f"output_dir={tmp_path / 'stopped'}", "save_strategy=steps", "save_steps=2")
    send_at(monkeypatch, staging, "write_manifest", number)
    assert train(*words)[0] == 128 + number
    names = sorted(path.name for path in (tmp_path / "stopped").glob("*checkpoint*"))
    assert names == ["checkpoint-2", "checkpoint-3"]
    assert all(why_incomplete(tmp_path / "stopped" / name) is None for name in names)


def test_a_second_signal_in_a_save_leaves_the_earlier_checkpoint(
    train, unbroken, tmp_path, monkeypatch
):
    folder = tmp_path / "stopped"
    words = (f"output_dir={folder}", "save_strategy=steps", "save_steps=1")
    own, calls = staging.write_manifest, []

    def twice(path):
        calls.append(path)
        if len(calls) == 3:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        own(path)

    with monkeypatch.context() as patched:
        patched.setattr(staging, "write_manifest", twice)
        assert train(*words)[0] == 130
    names = sorted(path.name for path in folder.glob("*checkpoint*"))
    assert names == ["checkpoint-1", "checkpoint-2"]
    assert all(why_incomplete(folder / name) is None for name in names)
    assert train(*words, "--resume")[0] == 0
    found = load_file(folder / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


def test_a_reader_that_is_gone_costs_no_checkpoint(train, tmp_path, monkeypatch):
    """`lite-orpo train ... | tee log`: a Ctrl-C ends tee too, and earlier."""
    reader, writer = os.pipe()
    own = MetricsFile.on_log

    def leaves_then_stops(self, args, state, control, **options):
        if state.global_step == 2 and reader_is_open:
            os.close(reader_is_open.pop())
            signal.raise_signal(signal.SIGINT)
        return own(self, args, state, control, **options)

    reader_is_open = [reader]
    monkeypatch.setattr(MetricsFile, "on_log", leaves_then_stops)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert train(f"output_dir={tmp_path / 'stopped'}")[0] == 130
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert why_incomplete(checkpoint) is None


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        (train_command, "load_model", "Stopped; nothing has been trained yet."),
        (train_command.ORPOTrainer, "_get_train_sampler", "Stopped; --resume goes on from"),
        (train_command, "_answers_after", "Stopped; what was trained is in"),
    ],
    ids=["loading", "training begins", "samples"],
)
def test_outside_of_the_steps_it_says_what_there_is(owner, name, told, train, monkeypatch):
    send_at(monkeypatch, owner, name, signal.SIGINT)
    assert train()[0] == 130
    assert train.output.splitlines()[-1].startswith(told)


def test_a_resume_that_is_refused_leaves_the_settings_of_the_run(train, tmp_path):
    words = ("save_strategy=steps", "save_steps=2")
    assert train(*words)[0] == 0
    before = (tmp_path / "out" / "config.resolved.yaml").read_text()
    code, error, _ = train(*words, "--resume", "beta=0.7", "max_steps=6")
    assert code == 2 and "loss settings (beta 0.2 there, 0.7 here)" in error
    assert (tmp_path / "out" / "config.resolved.yaml").read_text() == before
    assert train(*words, "--resume", "max_steps=6")[0] == 0
    assert "max_steps: 6" in (tmp_path / "out" / "config.resolved.yaml").read_text()


def test_the_clock_cuts_an_evaluation_too(train, tmp_path, monkeypatch):
    words = (f"output_dir={tmp_path / 'stopped'}", "eval_strategy=steps", "eval_steps=2")
    own, cut = TrainingProgress.on_prediction_step, []

    def slow(self, args, state, control, **options):
        if state.global_step == 2:
            cut.append(1)
            clock.append(clock[-1] + 30)
        return own(self, args, state, control, **options)

    monkeypatch.setattr(TrainingProgress, "on_prediction_step", slow)
    clock = [time.monotonic()]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[-1])
    assert train(*words, "per_device_eval_batch_size=1", "--stop-after", "20s")[0] == 0
    assert len(cut) == 1
    assert why_incomplete(tmp_path / "stopped" / "checkpoint-2") is None


def test_a_folder_that_another_process_trains_into_is_refused(train, tmp_path):
    folder = tmp_path / "out"
    holds = (
        "import sys, pathlib\nfrom lite_orpo.checkpoint.one_writer import only_writer\n"
        f"with only_writer(pathlib.Path({str(folder)!r})):\n print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    for words in ([], ["--resume"], ["overwrite_output_dir=true"]):
        code, error, _ = train(*words)
        assert code == 2 and "is being trained into by another process" in error
    other.communicate()
    assert train()[0] == 0
    assert not list(folder.glob(".lite-orpo*"))


def test_a_link_to_nowhere_is_called_so(train, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    code, error, _ = train()
    assert code == 2 and "out is a link to nowhere; name a folder" in error


def test_a_time_budget_stops_the_same_way(train, unbroken, tmp_path):
    words = (f"output_dir={tmp_path / 'stopped'}",)
    assert train(*words, "--stop-after", "0.01s")[0] == 0
    assert why_incomplete(tmp_path / "stopped" / "checkpoint-1") is None
    assert train(*words, "--resume")[0] == 0
    found = load_file(tmp_path / "stopped" / "adapter_model.safetensors")
    assert all((found[name] == unbroken[name]).all() for name in unbroken)


def test_a_stop_of_two_ranks_is_told_once_with_its_launcher(tmp_path):
    root = Path(__file__).parents[2]
    data = tmp_path / "pairs.jsonl"
    lines = (root / "examples/demo_data/train.jsonl").read_text().splitlines()[:8]
    data.write_text("\n".join(lines))
    words = [f"output_dir={tmp_path / 'stopped'}", f"dataset_name={data}", "use_cpu=true"]
    words += ["eval_dataset_name=null", "eval_strategy=no", "max_steps=2"]
    words += ["overwrite_output_dir=false"]
    words += ["per_device_train_batch_size=1", "gradient_accumulation_steps=1"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lite_orpo.cli.main"]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, *launch, "train", "examples/demo.yaml", *words, "--stop-after", "0.01s"],
        cwd=root, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("checkpoint-1 is complete") == 1
    (line,) = [line for line in done.stdout.splitlines() if "--resume" in line and "=" in line]
    named = shlex.split(line)
    assert named[:5] == ["torchrun", *launch[2:]]
    path, overrides = split_arguments(named[6:-1], None)
    assert path == Path("examples/demo.yaml")
    assert {k: s.value for k, s in overrides.items()} == {
        k: s.value for k, s in split_arguments(["x", *words], None)[1].items()
    }
