"""column_mapping: what the user says is taken, and nothing else is guessed beside it."""

import pytest

from lite_orpo.data.files.sources import dataset_source
from lite_orpo.data.formats.rows import columns_used, describe_format, parse_row
from lite_orpo.errors import DataError, RowProblem

MAPPING = {"prompt": "query", "chosen": "good", "rejected": "bad"}
ROW = {"query": "q", "good": "a", "bad": "b", "source": "forum"}
ASK = {"role": "user", "content": "Why?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Because.", "No."))


def mapped(row, mapping=MAPPING):
    return next(iter(dataset_source("data", [row], mapping).read())).row


def test_columns_of_any_name_are_read_by_the_mapping():
    row = mapped(ROW)
    assert parse_row(row)[:3] == ("q", "a", "b")
    assert columns_used(row) == MAPPING
    assert describe_format(row) == "text (chosen: 'good', prompt: 'query', rejected: 'bad')"


def test_other_columns_stay_in_the_row():
    assert mapped(ROW)["source"] == "forum"


def test_a_mapped_prompt_settles_which_of_two_it_is():
    row = {"prompt": "raw", "question": "templated", "context": "c", "chosen": "a", "rejected": "b"}
    assert parse_row(mapped(row, {"prompt": "question"})).prompt == "templated"
    assert parse_row(mapped(row, {"prompt": "prompt"})).prompt == "raw"


def test_a_prompt_of_null_takes_it_from_the_messages():
    row = {"prompt": "else", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    assert parse_row(mapped(row, {"prompt": None}))[:3] == ([ASK], [GOOD], [BAD])


def test_a_system_of_null_leaves_the_column_out():
    row = {"system": "gpt-4", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_row(mapped(row, {"system": None})).prompt == "q"
    assert parse_row(row).prompt == [
        {"role": "system", "content": "gpt-4"},
        {"role": "user", "content": "q"},
    ]


@pytest.mark.parametrize("column", ["context", "messages", "document", "conversation_history"])
def test_a_context_of_null_leaves_the_column_out(column):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", column: "More than that was said."}
    assert parse_row(mapped(row, {column: None}))[:3] == ("q", "a", "b")
    with pytest.raises(RowProblem, match=f"column_mapping: {{{column}: null}}"):
        parse_row(row)
    with pytest.raises(DataError, match="is none of"):
        mapped(row, {column: "other"})


def test_completions_may_be_swapped():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    parsed = parse_row(mapped(row, {"chosen": "rejected", "rejected": "chosen"}))
    assert (parsed.chosen, parsed.rejected) == ("b", "a")


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"good": "a", "bad": "b"}, "query", "is missing (column_mapping names it); columns found"),
        ({**ROW, "query": None}, "query", "is null"),
        ({**ROW, "good": ""}, "good", "is empty"),
        ({**ROW, "bad": "a"}, "bad", "is identical to column 'good'"),
        ({**ROW, "bad": 3}, "bad", "found a number"),
    ],
    ids=["missing", "null", "empty", "identical", "number"],
)
def test_a_problem_names_the_users_column(row, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row(mapped(row))
    assert caught.value.column == column
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"query": "prompt"}, "'query' is none of prompt, chosen, rejected, system, tools; write "
                              "prompt: query"),
        ({"answer": "good"}, "'answer' is none of"),
        ({"chosen": None}, "chosen must be a column's name, found null"),
        ({"prompt": 3}, "prompt must be a column's name, found 3"),
        ({"chosen": "a", "rejected": "a"}, "column 'a' is named twice"),
        (["prompt"], "must be a mapping"),
    ],
    ids=["turned-round", "unknown", "null", "number", "twice", "list"],
)  # fmt: skip
def test_a_mapping_that_cannot_be_meant_is_refused(mapping, words):
    with pytest.raises(DataError) as caught:
        dataset_source("data", [ROW], mapping)
    assert words in str(caught.value)


def test_what_is_no_row_passes_through_and_is_named():
    with pytest.raises(RowProblem, match="the row is a list"):
        parse_row(mapped(["a"]))
