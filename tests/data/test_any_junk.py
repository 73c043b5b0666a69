"""Whatever stands in a row or a file: a pair, or an error of ours; never another exception."""

import csv
import gzip
import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lite_orpo.data.files.column_mapping import PARTS
from lite_orpo.data.files.sources import READERS, dataset_source, open_source
from lite_orpo.data.formats.row_columns import (
    COMPLETION_COLUMNS,
    CONTEXT_COLUMNS,
    PROMPT_COLUMNS,
    SYSTEM_COLUMNS,
)
from lite_orpo.data.formats.rows import columns_used, describe_format, parse_row
from lite_orpo.errors import DataError, RowProblem

MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

NAMES = [
    *PROMPT_COLUMNS, *CONTEXT_COLUMNS, *SYSTEM_COLUMNS, *sum(COMPLETION_COLUMNS, ()),
    "tools", "Prompt", "Chosen", " rejected", "messages", "source",
]  # fmt: skip
# Lone surrogates, too: JSON can write them, and no tokenizer takes them.
TEXT = st.one_of(
    st.text(st.characters(), max_size=12),
    st.sampled_from(["", " ", "a", "b", "\n\nHuman: a\n\nAssistant: b", "NaN", "\x00", "\ud800",
                     "\n\nHuman: a\n\nAssistant:", "[{'role': 'user', 'content': 'a'}]"]),
)  # fmt: skip
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "usr", "Human"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE | JSON_VALUE, "content": TEXT | JSON_VALUE},
    optional={"tool_calls": JSON_VALUE, "name": JSON_VALUE},
)
SHORT = st.sampled_from([{"role": r, "content": c} for r in ("user", "assistant") for c in "ab"])
MESSAGES = st.lists(SHORT, max_size=4) | st.lists(SHORT | MESSAGE | JSON_VALUE, max_size=4)
VALUE = TEXT | MESSAGES | JSON_VALUE
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "why?"), ("assistant", "so"), ("assistant", "no"))
)
RIGHT = st.sampled_from([
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "why?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    {"prompt": "why?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "so", "rejected": "no", "tools": None},
    {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
])  # fmt: skip
NEARLY_RIGHT = st.builds(
    lambda row, other: {**row, **other},
    RIGHT,
    st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=1),
)
ROW = st.one_of(
    NEARLY_RIGHT,
    NEARLY_RIGHT,
    st.fixed_dictionaries({"chosen": TEXT, "rejected": TEXT}, optional={"prompt": VALUE}),
    st.fixed_dictionaries({"chosen": MESSAGES, "rejected": MESSAGES}, optional={"prompt": VALUE}),
    st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=8),
    JSON_VALUE,
)
ENDING = st.sampled_from(list(READERS))
MAPPING = st.dictionaries(
    st.sampled_from(PARTS) | TEXT, st.sampled_from(NAMES) | st.none() | JSON_VALUE, max_size=3
)


def check_one(row):
    assert isinstance(describe_format(row), str)
    try:
        parsed = parse_row(row)
        columns_used(row)
    except RowProblem as problem:
        text = str(problem)
        assert "Traceback" not in text
        assert len(text) < 1000
        return
    assert isinstance(parsed.chosen, str) == isinstance(parsed.rejected, str)
    assert isinstance(parsed.chosen, str) == isinstance(parsed.prompt, str)
    assert parsed.chosen != parsed.rejected
    assert not any(not value for value in (parsed.chosen, parsed.rejected))
    if parsed.is_conversational:
        assert all(side[-1]["role"] == "assistant" for side in (parsed.chosen, parsed.rejected))
    json.dumps(parsed, ensure_ascii=False, allow_nan=True).encode()


@MANY
@given(ROW)
def test_any_row_is_a_pair_or_a_row_problem(row):
    check_one(row)


@SOME
@given(ROW, MAPPING)
def test_any_mapping_is_applied_or_refused(row, mapping):
    try:
        source = dataset_source("data", [row], mapping)
    except DataError:
        return
    for _, mapped in source.read():
        check_one(mapped)


def check_file(content: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        path.write_bytes(content)
        try:
            for place, row in open_source(str(path), split="train").read():
                assert place
                check_one(row)
        except DataError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


@SOME
@given(
    st.lists(ROW, max_size=3),
    st.binary(max_size=6),
    st.integers(0, 200),
    st.sampled_from(list(READERS)),
)
def test_any_damage_to_a_file_gives_rows_or_an_error_with_its_name(rows, junk, at, ending):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    if ending.endswith(".gz"):
        content = gzip.compress(content)
    check_file(content[:at] + junk + content[at:], ending)
    check_file(content[:at], ending)


@SOME
@given(st.binary(max_size=200), ENDING, st.booleans())
def test_any_bytes_give_rows_or_an_error_with_their_name(content, ending, is_packed):
    check_file(gzip.compress(content) if is_packed else content, ending)


@SOME
@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), max_size=4), st.sampled_from(",;\t"))
def test_any_csv_gives_rows_or_an_error_with_its_name(records, delimiter):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["prompt", "chosen", "rejected"])
            writer.writerows(records)
        check_file(path.read_bytes(), ".csv")
