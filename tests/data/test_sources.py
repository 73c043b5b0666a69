"""Sources: every kind of file is read, and a broken one is named with the place and a remedy."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from lite_orpo.data.files.sources import SplitMissing, dataset_source, open_source
from lite_orpo.data.formats.rows import parse_row
from lite_orpo.data.prepared_sets import PreparedSets
from lite_orpo.errors import DataError, HubError

ROWS = [
    {"prompt": f"q{i}", "chosen": f"gut, für {i}", "rejected": f"bad\u2028 {i}"} for i in range(3)
]


@pytest.fixture(autouse=True)
def _cache_of_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def json_lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, split="train"):
    return list(open_source(str(path), split=split).read())


def write(path: Path, text: str, encoding="utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json"])
def test_json_lines_are_read_with_their_line_numbers(tmp_path, name):
    content = json_lines().encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [(f"line {i + 1}", row) for i, row in enumerate(ROWS)]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path):
    text = json_lines().replace("\n", "\r\n\r\n")
    path = write(tmp_path / "bom.jsonl", "\ufeff" + text)
    assert read(path) == [(f"line {2 * i + 1}", row) for i, row in enumerate(ROWS)]


def test_a_source_can_be_read_twice(tmp_path):
    source = open_source(str(write(tmp_path / "a.jsonl", json_lines())), split="train")
    assert list(source.read()) == list(source.read())


def test_a_json_list_is_read_entry_by_entry(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    assert read(path) == [(f"entry {i}", row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_are_read(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    getattr(datasets.Dataset.from_list(ROWS), f"to_{ending}")(str(path))
    assert [row for _, row in read(path)] == ROWS


def test_a_folder_gives_the_file_of_the_split(tmp_path):
    write(tmp_path / "train.jsonl", json_lines(ROWS[:2]))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[2:]).encode()))
    assert [row for _, row in read(tmp_path)] == ROWS[:2]
    assert [row for _, row in read(tmp_path, "test")] == ROWS[2:]


def test_in_memory_data_sets_are_read_row_by_row():
    for data in (ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)):
        source = dataset_source("train_dataset", data)
        assert source.size == 3
        assert list(source.read()) == [(f"row {i}", row) for i, row in enumerate(ROWS)]


def refused(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines()[:-1] + '\n\n{"prompt": "q",}\n' + json_lines())
    message = refused(lambda: read(path))
    assert f"{path} line 5: not valid JSON" in message
    assert "at character 16)" in message


def test_a_truncated_archive_is_named_with_the_last_good_line(tmp_path):
    lines = json_lines([{"prompt": f"{i * 7919 % 1000}", "chosen": "a"} for i in range(2000)])
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-2000])
    message = refused(lambda: read(path))
    assert "damaged or cut off" in message
    assert f"{path} after line " in message
    assert "after line 0" not in message


def test_a_file_that_is_no_archive_is_named(tmp_path):
    path = write(tmp_path / "plain.jsonl.gz", json_lines())
    assert f"{path} after line 0: the compressed file is damaged" in refused(lambda: read(path))


def test_latin_1_is_refused_with_the_byte(tmp_path):
    path = write(tmp_path / "l1.jsonl", '{"prompt": "q"}\n{"prompt": "caf\u00e9"}\n', "latin-1")
    message = refused(lambda: read(path))
    assert f"{path} line 2: byte 0xe9 is not UTF-8" in message


def test_a_deeply_nested_line_is_refused(tmp_path):
    path = write(tmp_path / "deep.jsonl", "[" * 200_000 + "\n")
    message = refused(lambda: read(path))
    assert f"{path} line 1: " in message


def test_a_broken_json_list_is_refused(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ROWS)[:-1])
    assert f"{path}: not valid JSON" in refused(lambda: read(path))


def test_an_empty_file_has_no_rows(tmp_path):
    # That a data set must not be empty is the preparation's business.
    assert read(write(tmp_path / "empty.jsonl", "")) == []
    assert read(write(tmp_path / "empty.json", "")) == []


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_broken_table_is_refused(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", 'a,b\n"x\n' if ending == "csv" else "PAR1 no")
    message = refused(lambda: read(path))
    assert message.startswith(str(path))
    words = {
        "csv": "line 2: not valid CSV: a quote is opened",
        "parquet": "cannot be read as parquet",
    }
    assert words[ending] in message


@pytest.mark.parametrize(
    "name",
    ["missing.jsonl", "./missing", "/no/such/place", "~/no-such-place", "a/b/c", "x.csv"],
)
def test_a_missing_file_is_called_missing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: open_source(name, split="train"))
    assert message.startswith(f"{name}: no such file")


def test_an_unknown_ending_and_an_empty_folder_are_refused(tmp_path):
    path = write(tmp_path / "pairs.xlsx", "x")
    assert "unknown ending '.xlsx'" in refused(lambda: open_source(str(path), split="train"))
    message = refused(lambda: open_source(str(tmp_path), split="test"))
    assert message.startswith(f"{tmp_path}: the folder has no test.jsonl")


def test_a_hub_name_without_network_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError) as caught:
        open_source("nobody/no-such-pairs", split="train")
    message = str(caught.value)
    assert "'nobody/no-such-pairs'" in message
    assert "network" in message
    assert "\n" not in message


def test_of_a_data_set_dict_the_split_train_is_taken_and_nothing_else():
    table = datasets.Dataset.from_list(ROWS)
    source = dataset_source("train_dataset", datasets.DatasetDict({"train": table, "test": table}))
    assert source.name == "train_dataset['train']"
    assert [row for _, row in source.read()] == ROWS
    message = refused(lambda: dataset_source("data", datasets.DatasetDict({"test": table})))
    assert "dictionary of splits ('test')" in message
    assert "'train'" in refused(lambda: dataset_source("data", {"train": ROWS}))


def test_a_stream_is_read_again_and_a_generator_once():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    source = dataset_source("train_dataset", stream)
    assert source.size is None
    assert list(source.read()) == list(source.read()) == [(f"row {i}", ROWS[i]) for i in range(3)]
    source = dataset_source("train_dataset", (row for row in ROWS))
    assert [row for _, row in source.read()] == ROWS
    assert "is a generator and has been read" in refused(source.read)


def test_an_object_that_gives_its_generator_twice_is_read_once():
    class Once:
        def __init__(self):
            self._rows = (row for row in ROWS)

        def __iter__(self):
            return self._rows

    source = dataset_source("train_dataset", Once())
    assert [row for _, row in source.read()] == ROWS
    assert "is a generator and has been read" in refused(source.read)


def test_a_dictionary_of_columns_is_called_one():
    columns = {part: [row[part] for row in ROWS] for part in ROWS[0]}
    for data in (columns, {**columns, "chosen": [[]], "prompt": []}, {"q": ["a"], "good": ["b"]}):
        message = refused(lambda data=data: dataset_source("train_dataset", data))
        assert "train_dataset is a dictionary of columns ('" in message
        assert "datasets.Dataset.from_dict(...)" in message


def test_evaluation_sets_that_are_columns_are_called_so():
    sets = PreparedSets(None, None, "skip")
    message = refused(lambda: sets.prepare_each("eval_dataset", {"prompt": ["q"], "chosen": ["a"]}))
    assert "eval_dataset is a dictionary of columns ('prompt', 'chosen')" in message


CHAT = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow"])
@pytest.mark.parametrize("row", [ROWS[0], CHAT], ids=["text", "messages"])
def test_the_format_of_a_data_set_does_not_change_its_rows(form, row):
    table = datasets.Dataset.from_list([{**row, "source": "forum"}] * 2)
    read = dataset_source("train_dataset", table.with_format(form, columns=list(row))).read()
    assert [row for _, row in read] == [row, row]


@pytest.mark.parametrize("mapping", [None, {"prompt": "prompt"}], ids=["plain", "mapped"])
@pytest.mark.parametrize(
    "kind", [tuple, lambda messages: np.array(messages, dtype=object)], ids=["tuple", "array"]
)
def test_messages_may_be_in_a_tuple_or_an_array(kind, mapping):
    row = {part: kind(messages) for part, messages in CHAT.items()}
    located = next(iter(dataset_source("train_dataset", [row], mapping).read()))
    assert parse_row(located.row)[:3] == tuple(CHAT.values())


def test_texts_of_numpy_are_texts():
    row = {part: np.str_(part) for part in CHAT}
    assert parse_row(row)[:3] == ("prompt", "chosen", "rejected")


@pytest.mark.parametrize(
    "thing", [3, None, object(), "rows.jsonl"], ids=["number", "none", "object", "text"]
)
def test_what_has_no_rows_is_refused(thing):
    assert "pass" in refused(lambda: dataset_source("train_dataset", thing))


def test_a_key_that_stands_twice_in_a_row_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n')
    with pytest.raises(DataError, match="line 1: key 'chosen' stands there twice"):
        list(open_source(str(path), split="train").read())


def test_a_json_file_that_is_one_object_is_no_list_of_rows(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('{"data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}')
    with pytest.raises(DataError, match="one JSON object; expected a list of rows"):
        list(open_source(str(path), split="train").read())


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            ValueError("Unknown split \"test\". Should be one of ['train']."),
            SplitMissing,
            "Unknown",
        ),
        (ValueError("Config name is missing.\nPick one"), DataError, "Config name is missing."),
        (RuntimeError("Dataset scripts are no longer supported"), DataError, "scripts"),
        (datasets.exceptions.DatasetGenerationError("bad file"), DataError, "bad file"),
        (datasets.exceptions.DatasetNotFoundError("no such"), HubError, "check the name"),
    ],
    ids=["split", "config", "script", "generation", "name"],
)
def test_what_the_hub_answers_is_one_line_with_the_name(monkeypatch, error, kind, words):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises((DataError, HubError)) as caught:
        open_source("someone/pairs", split="test")
    assert type(caught.value) is kind
    assert "'someone/pairs'" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_name_gives_its_split_with_the_mapping(monkeypatch):
    table = datasets.Dataset.from_list([{"q": "a", "chosen": "b", "rejected": "c"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    source = open_source("someone/pairs", split="train", column_mapping={"prompt": "q"})
    assert (source.name, source.size) == ("someone/pairs [train]", 1)
    assert next(iter(source.read())).row == {"chosen": "b", "rejected": "c", "prompt": "a"}
