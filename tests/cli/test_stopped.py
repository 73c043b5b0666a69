"""How long a run may take, and the command that goes on with it: read back as it was typed."""

import os
import shlex
import sys
from pathlib import Path

import pytest

import lite_orpo.cli.train as train_command
from lite_orpo.cli.overrides import split_arguments
from lite_orpo.cli.stopped import command_to_go_on, seconds_of
from lite_orpo.config.yaml_file import Setting
from lite_orpo.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"), [("45m", 2700), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400)]
)
def test_a_duration_is_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "45", "m", "-5m", "1d", "0s", "5m and more"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="--stop-after must be a duration such as 45m"):
        seconds_of(text)


def test_the_command_that_goes_on_has_what_was_typed(tmp_path):
    typed = {
        "learning_rate": Setting(1e-4, ""),
        "output_dir": Setting("my runs/a", ""),
        "bf16": Setting(False, ""),
        "max_length": Setting(None, ""),
        "resume_from_checkpoint": Setting(True, ""),
    }
    command = command_to_go_on(tmp_path / "config.yaml", typed)
    assert shlex.split(command) == [
        "lite-orpo", "train", str(tmp_path / "config.yaml"), "learning_rate=0.0001",
        "output_dir=my runs/a", "bf16=false", "max_length=null", "--resume",
    ]  # fmt: skip


def test_the_command_that_goes_on_is_the_one_that_was_called(tmp_path, monkeypatch):
    called = tmp_path / "my venv" / "bin" / "lite-orpo"
    called.parent.mkdir(parents=True)
    called.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(called), "train"])
    command = command_to_go_on(Path("c.yaml"), {})
    assert shlex.split(command) == [str(called), "train", "c.yaml", "--resume"]
    monkeypatch.setenv("PATH", str(called.parent), prepend=os.pathsep)
    assert command_to_go_on(Path("c.yaml"), {}) == "lite-orpo train c.yaml --resume"
    monkeypatch.setattr(sys, "argv", [str(Path(train_command.__file__).with_name("main.py"))])
    words = shlex.split(command_to_go_on(Path("c.yaml"), {}))
    assert words[:3] == [sys.executable, "-m", "lite_orpo.cli.main"]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "program"),
    [
        ({}, "lite-orpo"),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, "lite-orpo"),
        (TORCHRUN, "torchrun --nproc_per_node 4 -m lite_orpo.cli.main"),
        (
            {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch --num_processes 4 -m lite_orpo.cli.main",
        ),
        ({**TORCHRUN, "WORLD_SIZE": "8"}, None),  # two machines
        ({"WORLD_SIZE": "4"}, None),  # SLURM, mpirun, a script
    ],
    ids=["alone", "one rank", "torchrun", "accelerate", "machines", "unknown"],
)
def test_the_command_that_goes_on_has_the_launcher_as_far_as_it_is_known(environment, program):
    command = command_to_go_on(Path("c.yaml"), {}, environment)
    assert command == (program and f"{program} train c.yaml --resume")


@pytest.mark.parametrize(
    "value", ["true", "12", "null", "", "a: b", "x #y", "plain", 1e-5, [1, "2"]]
)
def test_a_value_in_the_command_reads_back_as_it_was(value, tmp_path):
    command = command_to_go_on(tmp_path / "c.yaml", {"run_name": Setting(value, "")})
    _, overrides = split_arguments(shlex.split(command)[2:-1], None)
    assert overrides["run_name"].value == value
    assert type(overrides["run_name"].value) is type(value)
