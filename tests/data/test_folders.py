"""Folders: the files of a split are found in the usual layouts, all of them or none."""

import json

import datasets
import pytest

from lite_orpo.data.files.sources import SplitMissing, open_source
from lite_orpo.errors import DataError

ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder, split="train", **options):
    return [row for _, row in open_source(str(folder), split=split, **options).read()]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl"],
        ["train.parquet"],
        ["data/train.jsonl"],
        ["data/train-00000-of-00001.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["train-00000-of-00002-1f2e3d.parquet", "train-00001-of-00002-4c5b6a.parquet"],
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["train/a.jsonl", "train/b.jsonl"],
        ["train.JSONL"],
        ["train/a.JSONL", "train/b.JSONL"],
        ["train-00000-of-00002.JSONL", "train-00001-of-00002.JSONL"],
    ],
    ids=lambda names: names[0],
)
def test_the_layouts_of_hub_snapshots_are_read_in_their_order(tmp_path, names):
    for index, name in enumerate(names):
        write(tmp_path / name, ROWS[2 * index : 2 * index + 2])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[3:])
    (tmp_path / "README.md").write_text("# data")
    assert rows_of(tmp_path) == ROWS[: 2 * len(names)]
    assert rows_of(tmp_path, "test") == ROWS[3:]


def test_hidden_files_are_no_shards(tmp_path):
    write(tmp_path / "train" / "a.jsonl")
    write(tmp_path / "more" / "b.jsonl")
    for name in (".DS_Store", "._a.jsonl", "train/._a.jsonl", "train/.DS_Store", "more/._b.jsonl"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert rows_of(tmp_path) == ROWS
    with pytest.raises(SplitMissing, match=r"found more/b\.jsonl, train/a\.jsonl; name"):
        rows_of(tmp_path, "test")


def test_a_configuration_is_a_sub_folder(tmp_path):
    write(tmp_path / "harmless-base" / "train.jsonl", ROWS[:1])
    write(tmp_path / "helpful-base" / "train.jsonl", ROWS[1:])
    assert rows_of(tmp_path, config_name="harmless-base") == ROWS[:1]


def test_rows_of_shards_name_their_file_and_are_counted(tmp_path):
    for index in range(2):
        write(tmp_path / f"train-0000{index}-of-00002.parquet", ROWS[:3])
    source = open_source(str(tmp_path), split="train")
    assert source.name == f"{tmp_path} [train]"
    assert source.size == 6
    assert [place for place, _ in source.read()][2:4] == [
        "train-00000-of-00002.parquet row 2",
        "train-00001-of-00002.parquet row 0",
    ]


@pytest.mark.parametrize("splits", [True, False], ids=["dict", "single"])
def test_what_save_to_disk_wrote_is_read(tmp_path, splits):
    table = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict({"train": table}) if splits else table
    saved.save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == ROWS
    with pytest.raises(SplitMissing):
        rows_of(tmp_path / "saved", "test")


def refused(folder, split="train"):
    with pytest.raises(DataError) as caught:
        open_source(str(folder), split=split)
    message = str(caught.value)
    assert message.startswith(str(folder))
    return message


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "shard 1 is not"),
        (["train-00000-of-00002.parquet"], "1 of the 2 shards of 'train' are there, shard 1"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "is there twice"),
        (["train.jsonl", "train.parquet"], "train.jsonl and train.parquet could both be 'train'"),
        (["train.jsonl", "data/train.jsonl"], "could both be 'train'; name one of them"),
        (["pairs.jsonl", "more.jsonl"], "found more.jsonl, pairs.jsonl; name a file"),
        (["data/train_prefs-00000-of-00001.parquet"], "found data/train_prefs-00000-of-00001"),
        (["README.md"], "no file in it ends in .jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_folder_in_doubt_is_refused_with_what_is_there(tmp_path, names, words):
    for name in names:
        write(tmp_path / name)
    assert words in refused(tmp_path)


def test_a_folder_that_lacks_the_split_is_told_from_one_that_is_broken(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(SplitMissing):
        open_source(str(tmp_path), split="test")
    write(tmp_path / "test-00000-of-00002.parquet")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path), split="test")
    assert not isinstance(caught.value, SplitMissing)


def test_a_name_that_cannot_be_a_path_is_refused():
    for name in ("x" * 5000, "~no-such-user-here/data.jsonl"):
        with pytest.raises(DataError):
            open_source(name, split="train")
