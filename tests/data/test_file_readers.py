"""Readers of files: every kind gives its rows with their places, or one line that says why not."""

import gzip
import io
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lite_orpo.data.files import bounded_file, csv_rows
from lite_orpo.data.files.sources import open_source
from lite_orpo.data.formats.rows import parse_row
from lite_orpo.errors import DataError, RowProblem

ROWS = [
    {"prompt": f"q{i}", "chosen": f'gut, "für" {i}\r\nzwei', "rejected": f"bad\u2028 {i}"}
    for i in range(3)
]
CHAT = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


def read(path):
    return list(open_source(str(path), split="train").read())


def refused(path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def csv_bytes(rows, **options):
    file = io.StringIO(newline="")
    import csv

    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


# ---- JSON ----


@pytest.mark.parametrize("indent", [None, 1], ids=["one-line", "indented"])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_list_of_any_length_is_read_entry_by_entry(tmp_path, name, indent):
    rows = [{**ROWS[i % 3], "number": i} for i in range(3000)]
    content = json.dumps(rows, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [(f"entry {i}", row) for i, row in enumerate(rows)]


def test_a_json_list_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "x" * 1000}] * 20_000))
    source = open_source(str(path), split="train")
    tracemalloc.start()
    assert sum(1 for _ in source.read()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 < path.stat().st_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1},\n {"a": 2,,}]', "line 2: "),
        ('[{"a": 1}\n {"a": 2}]', "line 2: expected , or ] after an entry"),
        ('[{"a": 1}]\n{"a": 2}', "line 2: something follows the list"),
        ('[{"a": 1}, ', "line 1: "),
        ('[{"a": 1}, {"a": 1, "a": 2}]', "key 'a' stands twice in entry 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "too long"),
        ('{"data":\n [1]}', "expected a list of rows, or one row a line"),
        ('{"rows": [{"prompt": "q"}]}', "one JSON object; expected a list of rows"),
    ],
    ids=["comma", "no-comma", "more", "cut", "twice", "deep", "number", "object", "wrapped"],
)
def test_a_json_file_that_is_no_list_of_rows_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert words in refused(path)


def test_a_json_entry_that_is_no_object_is_handed_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[1, null, "x", [2], 12345]  ')
    assert [row for _, row in read(path)] == [1, None, "x", [2], 12345]


def test_a_number_of_thousands_of_digits_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": ' + "1" * 5000 + "}\n")
    assert "line 2: a number is too long" in refused(path)


# ---- bounds ----


def test_a_line_over_the_bound_is_one_bad_row_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_file, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f'{good}\n{{"prompt": "{"x" * 300_000}"}}\n{good}\n')
    (_, first), (place, second), (last, third) = read(path)
    assert (first, third, place, last) == (ROWS[0], ROWS[0], "line 2", "line 3")
    with pytest.raises(RowProblem, match="cannot be read: the line is longer than"):
        parse_row(second)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_an_archive_that_unpacks_to_absurdly_much_is_refused_without_holding_it(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wb") as file:
        for _ in range(300):
            file.write(b" " * 2**18)
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "which no text does" in message or "longer than 16 MiB" in message
    assert peak < 50 * 2**20


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_an_archive_of_nothing_but_line_ends_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(bounded_file, "UNPACKED_WITHOUT_QUESTION", 2**18)
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"\n" * 2**20))
    assert "which no text does" in refused(path)


def test_many_copies_of_a_row_are_no_bomb(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    row = json.dumps(ROWS[0]).encode() + b"\n"
    path.write_bytes(gzip.compress(row * 20_000))
    assert sum(1 for _ in read(path)) == 20_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"{}"), "is a gzip archive; let its name end in .gz"),
        (b"PK\x03\x04rest", "is a zip archive"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
    ],
    ids=["gzip", "zip", "utf-16", "lfs", "html"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_is_plainly_something_else_is_called_so(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


# ---- CSV ----


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_every_cell_is_text_as_it_stands_with_the_line_it_begins_on(tmp_path, name, delimiter):
    content = csv_bytes(ROWS, delimiter=delimiter)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    # Each row has a line break within.
    assert read(tmp_path / name) == [(f"line {2 + 2 * i}", row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("answer", ["4", "None", "NA", "null", "true", "1e5", "nan", " 007"])
def test_an_answer_that_looks_like_a_number_or_nothing_stays_text(tmp_path, answer):
    path = tmp_path / "a.csv"
    path.write_bytes(csv_bytes([{"prompt": "q", "chosen": answer, "rejected": "b"}]))
    assert read(path)[0].row["chosen"] == answer


@pytest.mark.parametrize("indent", [None, 1], ids=["compact", "indented"])
def test_messages_written_as_json_are_messages(tmp_path, indent):
    path = tmp_path / "a.csv"
    cells = {key: json.dumps(value, indent=indent) for key, value in CHAT.items()}
    path.write_bytes(csv_bytes([cells]))
    assert parse_row(read(path)[0].row)[:3] == tuple(CHAT.values())


def test_messages_written_as_python_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(csv_bytes([{key: str(value) for key, value in CHAT.items()}]))
    with pytest.raises(RowProblem, match="a list of messages written as text"):
        parse_row(read(path)[0].row)


@pytest.mark.parametrize(
    "text",
    ['prompt, "chosen", rejected\nq,a,b\n', 'prompt,chosen,rejected\nq, "a", b\n',
     'prompt,chosen,rejected\n "q",a,b\n', 'prompt,chosen,rejected\nq, "a\nc", b\n'],
    ids=["names", "cells", "first-cell", "over-lines"],
)  # fmt: skip
def test_a_space_before_an_opening_quote_is_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    line = 1 if '"chosen"' in text else 2
    assert f"line {line}: " in refused(path)


def test_a_quote_after_a_space_inside_a_cell_is_text(tmp_path):
    row = {"prompt": 'he said, "no"', "chosen": ' "Yes."', "rejected": ' "a", "b"\n "c"'}
    path = tmp_path / "a.csv"
    path.write_bytes(csv_bytes([row]))
    assert read(path)[0].row == row


@pytest.mark.parametrize("cell", ["", " "], ids=["empty", "blank"])
def test_an_empty_cell_is_null_and_no_empty_prompt(tmp_path, cell):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,chosen,rejected\n{cell},yes,no\n")
    row = read(path)[0].row
    assert row == {"prompt": None, "chosen": "yes", "rejected": "no"}
    with pytest.raises(RowProblem, match="column 'prompt' is missing, "):
        parse_row(row)


@pytest.mark.parametrize("indent", [None, 1], ids=["one-line", "pretty"])
def test_a_json_list_named_jsonl_is_called_one(tmp_path, indent):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS, indent=indent))
    assert "line 1: the file is one JSON list, not one row a line; name it .json" in refused(path)


def test_a_nameless_index_column_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf,prompt,chosen,rejected\n\n0,q,a,b\n")
    assert read(path) == [("line 3", {"prompt": "q", "chosen": "a", "rejected": "b"})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('prompt,chosen\nq,"a\nq,b\n', "line 2: not valid CSV: a quote is opened in this row"),
        ('prompt,chosen\nq,a\nq,"a"b"\n', "line 3: not valid CSV"),
        ("prompt,chosen\nq,a,b\n", "line 2: 3 cells where the first line names 2 columns"),
        ("prompt,chosen\nq\n", "line 2: 1 cells"),
        ("prompt,prompt\nq,a\n", "line 1: column 'prompt' stands there twice"),
    ],
    ids=["open-quote", "inner-quote", "too-many", "too-few", "twice"],
)
def test_wrong_quoting_is_named_with_the_line_the_row_begins_on(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert words in refused(path)


def test_a_quote_that_never_closes_does_not_read_the_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "MAX_LINE_BYTES", 10_000)
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen\nq,"a\n' + "q,b\n" * 100_000)
    assert "line 2: the row is longer than" in refused(path)


def test_latin_1_in_a_table_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,chosen\nq,a\ncaf\u00e9,b\n".encode("latin-1"))
    assert "line 3: byte 0xe9 is not UTF-8" in refused(path)


# ---- parquet ----


def test_rows_of_parquet_are_numbered_and_counted(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([CHAT] * 600).to_parquet(str(path))
    source = open_source(str(path), split="train")
    assert source.size == 600
    rows = list(source.read())
    assert [place for place, _ in rows] == [f"row {i}" for i in range(600)]
    assert parse_row(rows[-1].row)[:3] == tuple(CHAT.values())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99], ids=["empty", "half", "almost"])
def test_a_parquet_file_cut_off_is_named(tmp_path, share):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS * 100).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cannot be read as parquet" in refused(path)


def test_parquet_with_bytes_that_were_overwritten_gives_an_error_or_rows(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"prompt": f"{i * 7919}"} for i in range(5000)]).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[100:140] = b"\xff" * 40
    path.write_bytes(content)
    assert "cannot be read as parquet" in refused(path)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "column 'chosen' stands there twice" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "dates",
    [pa.array([2**30], pa.date32()), pa.array([2**62], pa.timestamp("us")),
     pa.array([2**62], pa.duration("s")), pa.array([[2**62]], pa.list_(pa.timestamp("us")))],
    ids=["date", "timestamp", "duration", "list"],
)  # fmt: skip
def test_dates_outside_pythons_range_do_not_take_the_other_columns_along(tmp_path, dates):
    path = tmp_path / "a.parquet"
    texts = {part: pa.array([part]) for part in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table({**texts, "at": dates}), path)
    assert parse_row(read(path)[0].row)[:3] == ("prompt", "chosen", "rejected")
    pq.write_table(pa.table({**texts, "chosen": dates}), path)
    with pytest.raises(RowProblem, match="column 'chosen' must be text or a list of messages"):
        parse_row(read(path)[0].row)
