"""Harm to any file of a checkpoint: it is passed over with a message, or refused where named."""

import json
import shutil

import pytest
from small_runs import digests, trainer

from lite_orpo.checkpoint.manifest import MANIFEST_FILE
from lite_orpo.errors import CheckpointError

# Those of a run of `small_runs.py`; a test compares.
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "fingerprint.json",
    "manifest.json",
    "optimizer.json",
    "optimizer.safetensors",
    "random_0.json",
    "random_0.safetensors",
    "scheduler.json",
    "scheduler.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
]


def cut(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def grow(path):
    with path.open("ab") as stream:
        stream.write(b" ")


def link(path):
    """To the same bytes elsewhere."""
    elsewhere = path.parents[2] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_in_a_circle(path):
    path.unlink()
    path.symlink_to(path.name)


def make_folder(path):
    path.unlink()
    path.mkdir()


HARMS = {
    "cut": cut, "emptied": empty, "removed": lambda path: path.unlink(), "a bit": flip,
    "grown": grow, "link": link, "circle": link_in_a_circle, "folder": make_folder,
}  # fmt: skip


class Resolved(Exception):
    """The run has found what it goes on from."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory):
    """A trainer that stops where it would begin: what it would go on from is what counts."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = trainer(folder)

    def prepare(checkpoint):
        raise Resolved(checkpoint)

    run._prepare_folder = prepare
    return run, folder


def put(folder, unbroken):
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(unbroken / name, folder / name)
    return folder / "checkpoint-4"


def test_these_are_all_files_of_a_checkpoint(unbroken):
    assert sorted(digests(unbroken / "checkpoint-4")) == FILES


def check_refused(one_for_all, caplog, named):
    """By both ways to ask for it, with a word on what it is about."""
    run, folder = one_for_all
    with pytest.raises(Resolved) as found:
        run.train(resume_from_checkpoint=True)
    assert found.value.args == (str(folder / "checkpoint-2"),)
    (line,) = [r.getMessage() for r in caplog.records if "is passed over" in r.getMessage()]
    assert line.startswith("checkpoint-4 is passed over: ")
    with pytest.raises(CheckpointError, match="is no complete checkpoint") as refused:
        run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for text in (line, str(refused.value)):
        assert named in text
        assert "\n" not in text


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_is_named_and_its_checkpoint_not_gone_on_from(
    name, harm, unbroken, one_for_all, caplog
):
    path = put(one_for_all[1], unbroken) / name
    HARMS[harm](path)
    if name == MANIFEST_FILE and harm == "grown":  # white space behind JSON is no harm
        path.write_bytes(path.read_bytes() + b"}")
    # A bit of the manifest that is off speaks of some other file.
    is_elsewhere = name == MANIFEST_FILE and harm == "a bit"
    check_refused(one_for_all, caplog, "" if is_elsewhere else name)


@pytest.mark.parametrize(
    "where", ["../checkpoint-2/README.md", "absolute", "../../nowhere", "a\0b"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(where, unbroken, one_for_all, caplog):
    path = put(one_for_all[1], unbroken) / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    if where == "absolute":
        where = str(one_for_all[1] / "checkpoint-2" / "README.md")
    manifest["files"][where] = manifest["files"]["README.md"]
    path.write_text(json.dumps(manifest))
    check_refused(one_for_all, caplog, "a" if "\0" in where else where)


def test_what_is_found_in_place_of_the_damaged_one_is_gone_on_from_to_the_same_end(
    unbroken, tmp_path
):
    flip(put(tmp_path / "run", unbroken) / "optimizer.safetensors")
    trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random_0.safetensors"):
        assert (tmp_path / "run/checkpoint-4" / name).read_bytes() == (
            unbroken / "checkpoint-4" / name
        ).read_bytes()
