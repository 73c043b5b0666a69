"""A folder is a checkpoint if every byte that its manifest names is there, and not otherwise."""

import json
import shutil

import pytest

from lite_orpo.checkpoint import staging
from lite_orpo.checkpoint.find import newest_complete, rotate, set_aside
from lite_orpo.checkpoint.manifest import MANIFEST_FILE, why_incomplete
from lite_orpo.checkpoint.staging import (
    remove_leftovers,
    replaced_folder,
    staged,
    staging_folder,
)

FILES = {"weights.bin": b"0123456789" * 20, "state.json": b"{}\n", "inner/a.txt": b"text"}


def write(folder, files=FILES):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def checkpoint(output_dir, step, files=FILES):
    with staged(output_dir / f"checkpoint-{step}") as folder:
        write(folder, files)
    return output_dir / f"checkpoint-{step}"


def test_a_staged_folder_is_complete_and_leaves_nothing_beside_it(tmp_path):
    path = checkpoint(tmp_path, 5)
    assert why_incomplete(path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_failed_one_is_absent_and_the_older_one_of_its_name_stays(tmp_path):
    path = checkpoint(tmp_path, 5)
    with pytest.raises(OSError, match="full"), staged(path) as folder:
        write(folder, {"weights.bin": b"half"})
        raise OSError("the disk is full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]
    assert (path / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert why_incomplete(path) is None


def test_a_second_one_of_the_same_name_takes_its_place(tmp_path):
    checkpoint(tmp_path, 5)
    path = checkpoint(tmp_path, 5, {"weights.bin": b"new"})
    assert why_incomplete(path) is None
    assert (path / "weights.bin").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "removed", "a bit flipped"])
def test_any_harm_to_any_file_is_seen(name, harm, tmp_path):
    older, path = checkpoint(tmp_path, 3), checkpoint(tmp_path, 12)
    file = path / name
    content = bytearray(file.read_bytes())
    if harm == "removed":
        file.unlink()
    else:
        kept = {"truncated": len(content) // 2, "emptied": 0}.get(harm, len(content))
        if harm == "a bit flipped":
            content[len(content) // 2] ^= 4
        file.write_bytes(content[:kept])
    reason = why_incomplete(path)
    assert reason is not None
    # A hash in the manifest that is off by a bit speaks of another file.
    assert name in reason or name == MANIFEST_FILE
    found = newest_complete(tmp_path)
    assert found.checkpoint == older
    assert found.passed_over == [("checkpoint-12", reason)]


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-100"


def test_what_is_no_checkpoint_is_not_looked_at(tmp_path):
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-8-old").mkdir()
    staging_folder(tmp_path / "checkpoint-9").mkdir()
    assert newest_complete(tmp_path) == (None, [])
    assert newest_complete(tmp_path / "nowhere") == (None, [])


def test_a_folder_without_a_manifest_is_passed_over_and_the_reason_said(tmp_path):
    write(tmp_path / "checkpoint-4")
    (passed,) = newest_complete(tmp_path).passed_over
    assert passed.name == "checkpoint-4"
    assert "has no manifest.json" in passed.reason


def test_a_replacement_cut_off_between_its_renames_is_put_back(tmp_path):
    path = checkpoint(tmp_path, 5)
    path.rename(replaced_folder(path))
    assert newest_complete(tmp_path).checkpoint == path
    # Where the new one is in place already, the old one is only rubbish.
    shutil.copytree(path, replaced_folder(path))
    assert newest_complete(tmp_path).checkpoint == path


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 3}}', "\x00", "1"],
)
def test_a_manifest_of_another_shape_is_damaged_or_unknown(manifest, tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / MANIFEST_FILE).write_text(manifest)
    assert MANIFEST_FILE in why_incomplete(path) or "format 2" in why_incomplete(path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = checkpoint(tmp_path, 5)
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    entry = {
        "size": 1,
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    }
    (path / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": {"../outside.txt": entry}}))
    assert "outside of it" in why_incomplete(path)


@pytest.mark.parametrize(
    "manifest", ['{"format": 1, "files": {}}', '{"format": 1e999}', "[" * 9999]
)
def test_an_empty_or_absurd_manifest_makes_nothing_complete(manifest, tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / MANIFEST_FILE).write_text(manifest)
    assert MANIFEST_FILE in str(why_incomplete(path)) or "format inf" in str(why_incomplete(path))


def test_a_file_that_was_put_there_later_makes_it_incomplete(tmp_path):
    """A library might load it instead of what was written."""
    path = checkpoint(tmp_path, 5)
    (path / ".DS_Store").write_bytes(b"x")
    assert why_incomplete(path) is None
    (path / "pytorch_model.bin").write_bytes(b"x")
    assert why_incomplete(path) == f"pytorch_model.bin is not in its {MANIFEST_FILE}"


def test_checkpoints_of_later_steps_are_set_aside_and_kept(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    for expected in ("checkpoint-6.superseded", "checkpoint-6.superseded-2"):
        assert set_aside(tmp_path, tmp_path / "checkpoint-4") == [expected]
        assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-4"
        checkpoint(tmp_path, 6)


def test_rotation_deletes_the_oldest_and_never_what_is_to_be_kept(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    keep = {tmp_path / "checkpoint-8", tmp_path / "checkpoint-2"}
    rotate(tmp_path, 3, keep)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "6", "8"]
    rotate(tmp_path, 1, keep)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "8"]
    rotate(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_dead_process_left_is_removed(tmp_path):
    staging_folder(tmp_path / "checkpoint-3").mkdir()
    checkpoint(tmp_path, 5)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_older_one_of_a_name_is_there_until_the_new_one_is_in_place(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 5)
    own, seen = staging.Path.rename, []

    def rename(self, target):
        result = own(self, target)
        if "copy" in self.parts:
            return result  # looking at it renames there, too
        seen.append(newest_complete_of_a_copy(tmp_path))
        return result

    monkeypatch.setattr(staging.Path, "rename", rename)
    checkpoint(tmp_path, 5, {"weights.bin": b"new"})
    assert seen == ["checkpoint-5", "checkpoint-5"]
    assert path.exists()


def newest_complete_of_a_copy(output_dir):
    copy = output_dir / "copy"
    shutil.copytree(output_dir, copy, ignore=shutil.ignore_patterns("copy"))
    found = newest_complete(copy).checkpoint
    shutil.rmtree(copy)
    return found and found.name


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_replacement_that_fails_between_its_renames_leaves_the_older_one_in_place(
    error, tmp_path, monkeypatch
):
    path = checkpoint(tmp_path, 5)
    own = staging.Path.rename

    def rename(self, target):
        if self == staging_folder(path):
            raise error
        return own(self, target)

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(staging.Path, "rename", rename)
        checkpoint(tmp_path, 5, {"weights.bin": b"new"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]
    assert (path / "weights.bin").read_bytes() == FILES["weights.bin"]


def test_what_was_replaced_does_not_come_back_once_its_successor_is_set_aside(tmp_path):
    checkpoint(tmp_path, 3)
    path = checkpoint(tmp_path, 5)
    shutil.copytree(path, replaced_folder(path))
    remove_leftovers(tmp_path)
    set_aside(tmp_path, tmp_path / "checkpoint-3")
    assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-3"
