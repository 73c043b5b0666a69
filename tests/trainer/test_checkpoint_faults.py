"""The process dies at any moment of a save: what is found is the old checkpoint or the new one.

The deaths here are at what Python's audit hooks see, on any Linux. `test_checkpoint_deaths.py` has
all of them, where system calls can be followed.
"""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import StopAt, trainer

from lite_orpo.checkpoint.find import newest_complete
from lite_orpo.checkpoint.manifest import MANIFEST_FILE, why_incomplete
from lite_orpo.errors import CheckpointError

DIED = 77


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run to its end, with checkpoints at its second and fourth step."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer(folder).train()
    return folder


class _Death:
    """Ends this process at the k-th thing it does to files, and tears what was not yet synced."""

    def __init__(self, at: int, folder: Path) -> None:
        self._left = at
        self._folder = str(folder)
        self._synced: set[str] = set()
        sync = os.fsync

        def counted_sync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._count()
            sync(descriptor)
            self._synced.add(path)

        os.fsync = counted_sync
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self._count_if_ours(arguments[0])
        elif event == "open" and isinstance(arguments[2], int):
            self._count_if_ours(arguments[0])

    def _count_if_ours(self, path):
        if isinstance(path, (str, os.PathLike)) and self._folder in str(path):
            self._count()

    def _count(self):
        self._left -= 1
        if self._left == 0:
            self._tear()
            os._exit(DIED)

    def _tear(self):
        # What the system had not written when the power went: any part may be missing.
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                if ".partial" in folder and path not in self._synced:
                    os.truncate(path, os.path.getsize(path) // 2)


def in_a_fork(work) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_death_at_every_moment_of_a_save_leaves_the_old_or_the_new_checkpoint(unbroken, tmp_path):
    """And a later save finds nothing in its way."""
    old = tmp_path / "checkpoint-2"
    shutil.copytree(unbroken / "checkpoint-2", old)
    saver = trainer(tmp_path, save_strategy="no", callbacks=[StopAt(3)])
    saver.train(resume_from_checkpoint=str(old))
    outcomes = []
    for moment in range(1, 1000):

        def die(moment=moment):
            _Death(moment, tmp_path)
            saver._save_checkpoint(saver.model, None)

        code = in_a_fork(die)
        found = newest_complete(tmp_path)
        assert found.checkpoint is not None, moment
        assert why_incomplete(found.checkpoint) is None
        outcomes.append(found.checkpoint.name)
        if code == 0:
            break
        assert code == DIED
        shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    print(f"{len(outcomes)} moments, the old one {outcomes.count('checkpoint-2')} times")
    # Once the new one is there it stays.
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 40
    assert outcomes[-1] == "checkpoint-3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    goes_on = trainer(tmp_path)
    goes_on.train(resume_from_checkpoint=True)
    assert same_weights(weights(tmp_path / "checkpoint-4"), weights(unbroken / "checkpoint-4"))


def test_a_run_goes_on_bit_for_bit_from_the_newest_complete_checkpoint(unbroken, tmp_path, caplog):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").unlink()
    goes_on = trainer(tmp_path)
    goes_on.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is passed over: optimizer.safetensors cannot be read" in caplog.text
    assert "set aside: checkpoint-4.superseded" in caplog.text
    # It has been written anew.
    assert why_incomplete(tmp_path / "checkpoint-4") is None
    assert same_weights(weights(tmp_path / "checkpoint-4"), weights(unbroken / "checkpoint-4"))


def test_every_file_of_a_checkpoint_is_in_its_manifest_and_none_is_a_pickle(unbroken):
    folder = unbroken / "checkpoint-4"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"optimizer.safetensors", "scheduler.json", "random_0.json", MANIFEST_FILE} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


def test_a_checkpoint_that_is_named_and_damaged_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    with (tmp_path / "checkpoint-2" / "optimizer.safetensors").open("r+b") as stream:
        stream.truncate(100)
    goes_on = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="is no complete checkpoint: optimizer.safetensors"):
        goes_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="has no complete checkpoint to go on from"):
        goes_on.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("at", ["rename", "fsync"])
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_is_as_it_was(
    at, unbroken, tmp_path, monkeypatch
):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    goes_on = trainer(tmp_path)
    monkeypatch.setattr(os, at, full)
    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written") as caught:
        goes_on.train(resume_from_checkpoint=True)
    assert "No space left on device" in str(caught.value)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    goes_on = trainer(tmp_path)
    goes_on.train(resume_from_checkpoint=True)
    assert same_weights(weights(tmp_path / "checkpoint-4"), weights(unbroken / "checkpoint-4"))


def test_rotation_keeps_the_newest(tmp_path):
    trainer(tmp_path, save_steps=1, save_total_limit=2).train()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert all(why_incomplete(tmp_path / name) is None for name in names)


def test_a_checkpoint_without_a_training_state_says_so(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="saved without its training state"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rotation_after_a_damaged_one_keeps_what_can_be_resumed(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").unlink()
    goes_on = trainer(tmp_path, save_steps=1, save_total_limit=1, callbacks=[StopAt(3)])
    goes_on.train(resume_from_checkpoint=True)
    assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-3"


def test_a_run_that_was_killed_after_its_last_step_is_finished(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    goes_on = trainer(tmp_path)
    goes_on.train(resume_from_checkpoint=True)
    assert goes_on.state.global_step == 4
    goes_on.save_model()
    assert same_weights(weights(tmp_path), weights(unbroken / "checkpoint-4"))


def test_a_checkpoint_beyond_the_end_of_a_run_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match="checkpoint-4 is beyond the end of the run"):
        trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_an_error_of_the_tokenizers_library_is_a_full_disk_too(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise Exception("No space left on device (os error 28)")  # as it raises it

    run = trainer(tmp_path)
    monkeypatch.setattr(type(run.processing_class), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be written .No space left"):
        run.train()


def test_a_scalers_state_is_saved_and_loaded(unbroken, tmp_path):
    class Scaler:
        state = {"scale": 1024.0, "growth_tracker": 7}

        def state_dict(self):
            return dict(self.state)

        def load_state_dict(self, state):
            self.loaded = state

    run = trainer(tmp_path)
    run.accelerator.scaler = Scaler()
    run._save_scaler(str(tmp_path))
    run._load_scaler(str(tmp_path))
    assert run.accelerator.scaler.loaded == Scaler.state


def test_not_to_resume_can_be_said(tmp_path):
    trainer(tmp_path).train(resume_from_checkpoint=False)
    assert why_incomplete(tmp_path / "checkpoint-4") is None
