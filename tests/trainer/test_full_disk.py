"""The disk fills in the middle of a run: one line, nothing is lost, and it goes on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import full_disk_runs
import pytest
from full_disk import PAGE, NotPermitted, on_small_disk
from small_runs import StopAt, digests, state_of, trainer

from lite_orpo.checkpoint import staging
from lite_orpo.checkpoint.find import newest_complete
from lite_orpo.errors import CheckpointError
from lite_orpo.step.random_state import RandomState

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
PLENTY = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def _can_mount(tmp_path_factory):
    try:
        on_small_disk(tmp_path_factory.mktemp("disk"), PAGE, lambda resize: None)
    except NotPermitted as error:
        pytest.skip(f"no file system can be mounted here: {error}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer(folder).train()
    return folder


def pages(folder):
    """What a folder takes on a tmpfs, folders themselves left out."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) for size in sizes)


def test_whichever_file_fills_the_disk_the_earlier_checkpoint_stays_and_the_next_save_succeeds(
    unbroken, tmp_path, monkeypatch
):
    disk, old = tmp_path / "disk", unbroken / "checkpoint-2"
    saver = trainer(disk, save_strategy="no", callbacks=[StopAt(3)])
    saver.train(resume_from_checkpoint=str(old))
    for path in disk.iterdir():
        shutil.rmtree(path)
    random_state = RandomState.now()
    remove, written = shutil.rmtree, []

    def look_and_remove(path, **options):
        if Path(path).is_dir():
            written.extend(one.name for one in Path(path).iterdir())
        remove(path, **options)

    def save():
        random_state.put_back()
        saver._save_checkpoint(saver.model, None)
        return digests(disk / "checkpoint-3")

    def fill(resize):
        shutil.copytree(old, disk / "checkpoint-2")
        try:
            return "", [], save()
        except CheckpointError as error:
            message, got_to = str(error), [*written]
        assert [path.name for path in disk.iterdir()] == ["checkpoint-2"]
        assert digests(disk / "checkpoint-2") == digests(old)
        assert newest_complete(disk).checkpoint is not None
        resize(PLENTY)
        return message, got_to, save()

    monkeypatch.setattr(staging.shutil, "rmtree", look_and_remove)
    *_, whole = on_small_disk(disk, PLENTY, fill)
    reached, message, size = [], None, pages(old)
    while message != "":
        # A folder and a name take no page of a tmpfs, so that every step is one more of files.
        size += 1
        message, got_to, afterwards = on_small_disk(disk, size * PAGE, fill)
        assert afterwards == whole
        if message:
            assert re.fullmatch(r"checkpoint-3 could not be written \(.+\); earlier .+", message)
            assert "No space left on device" in message
            reached.append(len([name for name in got_to if not name.startswith(".tmp")]))
    print(f"{len(reached)} sizes, full after {reached} files")
    assert reached == sorted(reached)
    assert len(set(reached)) >= 9  # so many of the fourteen files were the one that did not fit


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `full_disk_runs.py` saw: trainings and commands on disks of many sizes."""
    out, disk = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("disk")
    command = [sys.executable, str(Path(full_disk_runs.__file__)), str(disk), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((out / "seen.json").read_text())


def test_a_run_on_a_disk_that_filled_ends_bit_for_bit_once_there_is_space(runs, unbroken):
    assert len(runs["trainings"]) >= 4
    for training in runs["trainings"]:
        assert "No space left on device" in training["message"]
        assert training["state"] == state_of(unbroken / "checkpoint-4"), training["pages"]
    assert {training["found"] for training in runs["trainings"]} == {None, "checkpoint-2"}


def test_the_command_says_in_one_line_what_did_not_fit_wherever_the_disk_is_full(runs):
    said = ""
    for command in runs["commands"]:
        code, error = command["tries"][0]
        print(command["pages"], error)
        assert code == 2
        assert len(error.splitlines()) == 1
        assert error.startswith("lite-orpo: error: ")
        assert "No space left on device" in error
        said += error
    for what in (
        "config.resolved.yaml", "metrics.jsonl", "checkpoint-2", "checkpoint-3",
        "what was trained", "the report",
    ):  # fmt: skip
        assert f"{what} could not be written" in said, what


def test_a_run_of_the_command_goes_on_to_the_same_weights_once_there_is_space(runs):
    for command in runs["commands"]:
        assert [code for code, _ in command["tries"][1:]] in ([], [0]), command
        assert command["weights"] == runs["weights"], command["pages"]
    assert sum(len(command["tries"]) > 1 for command in runs["commands"]) >= 4
