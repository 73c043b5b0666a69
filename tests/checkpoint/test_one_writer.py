"""One process at a time trains into a folder, and one that was killed keeps nobody out."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from lite_orpo.checkpoint import one_writer
from lite_orpo.checkpoint.one_writer import LOCK_FILE, only_writer
from lite_orpo.errors import CheckpointError

HOLDS = """
import sys
from pathlib import Path
from lite_orpo.checkpoint.one_writer import only_writer
with only_writer(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_ends(other, tmp_path):
    with pytest.raises(CheckpointError, match="is being trained into by another process"):
        with only_writer(tmp_path):
            pass
    other.communicate()
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_a_process_that_was_killed_keeps_nobody_out(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_may_take_it_again_and_keeps_it_until_the_outer_end(tmp_path):
    with only_writer(tmp_path / "new"):
        with only_writer(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK_FILE).exists()
        done = subprocess.run(
            [sys.executable, "-c", HOLDS, str(tmp_path / "new")], input=b"", capture_output=True
        )
        assert done.returncode != 0 and b"another process" in done.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_system_without_locks_refuses_nothing(tmp_path, monkeypatch):
    def has_none(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(one_writer, "_lock", has_none)
    with only_writer(tmp_path):
        pass


def test_a_lock_on_a_file_that_was_just_deleted_is_none(tmp_path, monkeypatch):
    own, calls = one_writer._lock, []

    def deleted_meanwhile(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            os.unlink(tmp_path / LOCK_FILE)
        own(descriptor)

    monkeypatch.setattr(one_writer, "_lock", deleted_meanwhile)
    with only_writer(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK_FILE).exists()
