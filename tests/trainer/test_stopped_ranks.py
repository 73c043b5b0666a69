"""Two ranks under torchrun that are stopped by a signal leave one complete checkpoint of both."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stopped_ranks
from small_runs import digests

from lite_orpo.checkpoint.find import newest_complete

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads process groups")
END = f"checkpoint-{stopped_ranks.STEPS}"


def launch(folder: Path, *words: str) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(Path(stopped_ranks.__file__)), str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def finished(process: subprocess.Popen, folder: Path) -> int:
    try:
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            print((folder / "log").read_text()[-4000:])


def wait_for_ranks(process: subprocess.Popen, folder: Path) -> list[int]:
    ends = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < ends:
        texts = [p.read_text() for p in (folder / "pid0", folder / "pid1") if p.exists()]
        if len(texts) == 2 and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text()[-4000:])


def state(folder: Path) -> dict[str, str]:
    names = ("adapter_model.safetensors", "optimizer", "scheduler", "random_")
    return {name: digest for name, digest in digests(folder).items() if name.startswith(names)}


def to_the_launcher(process, ranks):
    process.send_signal(signal.SIGTERM)


def to_the_group(process, ranks):
    """As a terminal does at Ctrl-C, and some do that reach every process of a job."""
    os.killpg(process.pid, signal.SIGINT)


def to_every_process(process, ranks):
    """As a batch system does: the launcher hands on to ranks what they have had already."""
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)


SENDS = {send.__name__: send for send in (to_the_launcher, to_the_group, to_every_process)}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of runs that were stopped, each in its way, before they were gone on with."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SENDS}
    for name, folder in folders.items():
        process = launch(folder)
        SENDS[name](process, wait_for_ranks(process, folder))
        finished(process, folder)
    return folders


@pytest.mark.parametrize("name", SENDS)
def test_ranks_that_are_stopped_leave_a_complete_checkpoint_of_both(name, stopped):
    run = stopped[name] / "run"
    found = newest_complete(run)
    assert found.checkpoint is not None, (stopped[name] / "log").read_text()[-4000:]
    (checkpoint,) = (path for path in run.iterdir() if path.name != END)
    assert checkpoint.name.startswith("checkpoint-")
    assert {"random_0.json", "random_1.json"} <= digests(checkpoint).keys()


def test_what_was_stopped_ends_bit_for_bit_where_an_unbroken_run_does(stopped, tmp_path):
    process = launch(tmp_path, "resume", *map(str, stopped.values()))
    assert finished(process, tmp_path) == 0, (tmp_path / "log").read_text()[-4000:]
    unbroken = state(tmp_path / "run" / END)
    assert {"random_0.json", "random_1.json"} <= unbroken.keys()
    for name, folder in stopped.items():
        assert state(folder / "run" / END) == unbroken, name
