"""A save is killed at every system call of it: what is found is the old checkpoint or the new one.

Each death is looked at five times: as the process left the folder, and as a loss of power may
have (`power_loss.py`).
"""

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from power_loss import Unsynced
from small_runs import SaveEachStep, StopAt, digests, state_of, trainer
from syscall_deaths import OPENS, REMOVALS, RENAMES, SYNCS, WRITES, Followed, follow, why_not

from lite_orpo.checkpoint.find import newest_complete
from lite_orpo.checkpoint.manifest import MANIFEST_FILE
from lite_orpo.checkpoint.staging import replaced_folder, staging_folder
from lite_orpo.step.random_state import RandomState

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
GROUPS = {
    "open": OPENS, "write": WRITES, "sync": SYNCS, "rename": RENAMES, "remove": REMOVALS,
    "mkdir": {"mkdir", "mkdirat"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _can_follow():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run to its end, with checkpoints at its second and fourth step."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def other_course(tmp_path_factory):
    """Checkpoints of the same run at another learning rate: none of its files may come in."""
    folder = tmp_path_factory.mktemp("other")
    trainer(folder, learning_rate=0.02, save_steps=1).train()
    return folder


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that is at hand: a real disk takes its time for a thousand syncs."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def saver(unbroken, tmp_path):
    """A trainer at its third step, not yet saved, whose folder is `tmp_path / "run"`."""
    run = trainer(tmp_path / "run", save_strategy="no", callbacks=[StopAt(3)])
    run.train(resume_from_checkpoint=str(unbroken / "checkpoint-2"))
    return run


class Deaths(NamedTuple):
    """One death before each call of what was done, and what was found after it."""

    whole: Followed
    """Nobody killed it."""
    final: dict[str, dict[str, str]]
    """Digests of the checkpoints that it leaves."""
    found: list[tuple[str, str, dict[str, str]]]
    """For each death and each way to lose power: the way, the newest complete one, its digests."""

    def kinds(self) -> Counter:
        calls = self.whole.calls
        return Counter({name: sum(c.kind in of for c in calls) for name, of in GROUPS.items()})


def die_everywhere(work: Callable[[], Any], before: Any, folder: Any) -> Deaths:
    """Do `work` on copies of a folder: once to its end, then killed before each of its calls."""

    def start(die_at=None):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        return follow(work, folder, die_at)

    whole = start()
    assert whole.exit_code == 0
    left = Unsynced(whole.calls, folder)
    assert not left.files, "once it has returned, no loss of power may touch it"
    assert not [whole.calls[index] for index in left.names if whole.calls[index].target]
    final = {path.name: digests(path) for path in folder.glob("checkpoint-*")}
    found, killed = [], []
    for moment in range(1, len(whole.calls) + 1):
        died = start(moment)
        assert died.exit_code is None, moment
        assert [c.kind for c in died.calls] == [c.kind for c in whole.calls[: moment - 1]]
        killed.append(died.killed_before.kind)
        for way, lose in Unsynced(died.calls, folder).ways_to_lose().items():
            copy = folder.with_name("copy")
            shutil.copytree(folder, copy)
            lose(copy)
            newest = newest_complete(copy).checkpoint
            assert newest is not None, (moment, way, died.killed_before)
            found.append((way, newest.name, digests(newest)))
            shutil.rmtree(copy)
    assert killed == [call.kind for call in whole.calls]
    assert start(len(whole.calls) + 1).exit_code == 0  # there is no further moment
    deaths = Deaths(whole, final, found)
    print(f"{len(killed)} deaths, looked at {len(found)} times: {dict(deaths.kinds())}")
    return deaths


def before(tmp_path, **checkpoints):
    """A run's folder with copies of checkpoints, `_3=path` being its third step's."""
    folder = tmp_path / "before"
    folder.mkdir()
    for step, path in checkpoints.items():
        shutil.copytree(path, folder / f"checkpoint-{step.strip('_')}")
    return folder


def check_old_or_new(deaths, old, new):
    """Only these two, and as the process left them, never the old one again after the new one."""
    assert old != new
    for way, name, found in deaths.found:
        assert found in (old, new), (way, name)
    alone = [found for way, _, found in deaths.found if way == "the process alone"]
    assert len(alone) == len(deaths.whole.calls)
    first_new = alone.index(new)
    assert 0 < first_new
    assert all(found == old for found in alone[:first_new])
    assert all(found == new for found in alone[first_new:])
    assert {way for way, _, _ in deaths.found} == {
        "the process alone", "half of the files", "the files", "the last name", "the names",
    }  # fmt: skip


def test_death_at_every_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    saver, unbroken, tmp_path
):
    folder = before(tmp_path, _2=unbroken / "checkpoint-2")
    deaths = die_everywhere(
        lambda: saver._save_checkpoint(saver.model, None), folder, tmp_path / "run"
    )
    new = deaths.final["checkpoint-3"]
    check_old_or_new(deaths, digests(unbroken / "checkpoint-2"), new)
    kinds = deaths.kinds()
    # Nothing is removed in a save that has nothing in its way; below it is.
    assert all(kinds[name] for name in GROUPS if name != "remove"), kinds
    # Each file of it was made, written and synced under the tracer's eyes: Rust's too.
    staging = staging_folder(tmp_path / "checkpoint-3").name
    of_kind = {
        name: {
            one
            for call in deaths.whole.calls
            if call.kind in GROUPS[name]
            for one in (call.path, call.target)
        }
        for name in GROUPS
    }
    for name in new:
        path = f"{staging}/{name}"
        assert path in of_kind["open"] | of_kind["rename"], name
        assert path in of_kind["sync"], name
    written = {call.inode for call in deaths.whole.calls if call.kind in WRITES}
    synced = {call.path: call.inode for call in deaths.whole.calls if call.kind in SYNCS}
    assert {"adapter_model.safetensors", "tokenizer.json", MANIFEST_FILE} <= new.keys()
    assert all(synced[f"{staging}/{name}"] in written for name in new)


def test_a_run_ends_bit_for_bit_after_a_death_before_each_kind_of_call(saver, unbroken, tmp_path):
    folder, run = before(tmp_path, _2=unbroken / "checkpoint-2"), tmp_path / "run"
    random_state = RandomState.now()  # at the third step; the trainings below draw from it

    def save():
        random_state.put_back()
        saver._save_checkpoint(saver.model, None)

    shutil.copytree(folder, run, dirs_exist_ok=True)
    calls = follow(save, run).calls
    kinds = [call.kind for call in calls]
    moments = {kind: kinds.index(kind) + 1 for kind in kinds} | {"last": len(kinds)}
    assert len(moments) >= 7
    for kind, moment in moments.items():
        shutil.rmtree(run)
        shutil.copytree(folder, run)
        died = follow(save, run, moment)
        assert died.exit_code is None
        ways = Unsynced(died.calls, run).ways_to_lose()
        ways.get("half of the files", ways["the process alone"])(run)
        trainer(run, callbacks=[SaveEachStep()]).train(resume_from_checkpoint=True)
        assert state_of(run / "checkpoint-4") == state_of(unbroken / "checkpoint-4"), kind
        names = sorted(path.name for path in run.iterdir())
        assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"], kind


def test_death_while_a_checkpoint_of_the_same_step_is_replaced_leaves_one_of_both(
    saver, other_course, tmp_path
):
    """It is the only one there."""
    folder = before(tmp_path, _3=other_course / "checkpoint-3")
    deaths = die_everywhere(
        lambda: saver._save_checkpoint(saver.model, None), folder, tmp_path / "run"
    )
    check_old_or_new(deaths, digests(other_course / "checkpoint-3"), deaths.final["checkpoint-3"])
    assert deaths.kinds()["remove"] > len(deaths.final["checkpoint-3"])


def test_death_while_the_only_older_checkpoint_is_rotated_away_leaves_one_of_both(
    saver, unbroken, tmp_path
):
    saver.args.save_total_limit = 1
    folder = before(tmp_path, _2=unbroken / "checkpoint-2")
    deaths = die_everywhere(
        lambda: saver._save_checkpoint(saver.model, None), folder, tmp_path / "run"
    )
    assert list(deaths.final) == ["checkpoint-3"]
    check_old_or_new(deaths, digests(unbroken / "checkpoint-2"), deaths.final["checkpoint-3"])


def test_death_while_a_run_clears_up_before_it_goes_on_leaves_what_it_goes_on_from(
    saver, unbroken, other_course, tmp_path
):
    """Later checkpoints of another course are there, whole and as deaths left them."""
    steps = {f"_{step}": other_course / f"checkpoint-{step}" for step in (3, 4)}
    folder = before(tmp_path, _2=unbroken / "checkpoint-2", **steps)
    shutil.copytree(other_course / "checkpoint-1", replaced_folder(folder / "checkpoint-4"))
    shutil.copytree(other_course / "checkpoint-1", staging_folder(folder / "checkpoint-3"))
    deaths = die_everywhere(
        lambda: saver._prepare_folder(str(tmp_path / "run" / "checkpoint-2")),
        folder,
        tmp_path / "run",
    )
    known = [digests(path) for path in folder.glob("checkpoint-*")]
    assert all(found in known for _, _, found in deaths.found)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-2", "checkpoint-3.superseded", "checkpoint-4.superseded",
    ]  # fmt: skip
    assert newest_complete(tmp_path / "run").checkpoint.name == "checkpoint-2"


def test_a_replacement_cut_off_between_its_renames_can_be_named(unbroken, tmp_path):
    shutil.copytree(unbroken / "checkpoint-2", replaced_folder(tmp_path / "checkpoint-2"))
    trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert state_of(tmp_path / "checkpoint-4") == state_of(unbroken / "checkpoint-4")


def test_a_fork_that_is_followed_is_killed_before_the_call_and_not_after(tmp_path):
    def work():
        (tmp_path / "a").write_text("x")
        with contextlib.suppress(FileExistsError):
            (tmp_path / "b").mkdir()
        (tmp_path / "a").rename(tmp_path / "b" / "a")

    died = follow(work, tmp_path, 4)
    assert [call.kind for call in died.calls] == ["openat", "write", "mkdir"]
    assert (died.killed_before.path, died.killed_before.target) == ("a", "b/a")
    assert (tmp_path / "a").read_text() == "x"
    assert follow(lambda: 1 / 0, tmp_path).exit_code == 1
