"""Preparation: which rows are kept, cut or left out, the count of it, and where ids live."""

import gc
import logging
import weakref
from pathlib import Path

import pytest
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data import parsed_rows, preparation
from lite_orpo.data.files.sources import dataset_source, open_source
from lite_orpo.data.preparation import LengthRule, prepare_pairs
from lite_orpo.data.preparation_report import TOOLS
from lite_orpo.data.tokens import template_limits
from lite_orpo.errors import DataError

NO_LIMIT = LengthRule(None, "drop")


def rows_of(*lengths):
    """Rows of (prompt, chosen, rejected) characters; BOS and EOS add one token each."""
    return [
        {"prompt": "abcdefghijklmnop"[:p], "chosen": "c" * c, "rejected": "r" * r}
        for p, c, r in lengths
    ]


def prepare(rows, tokenizer, rule=NO_LIMIT, on_bad_row="drop"):
    return prepare_pairs(dataset_source("train_dataset", rows), tokenizer, rule, on_bad_row)


GOOD = rows_of(*[(4, 3, 3)] * 19)


def test_every_row_becomes_token_ids_with_its_number_and_length(tokenizer):
    data, report = prepare(rows_of((2, 3, 5), (4, 2, 1)), tokenizer)
    assert len(data) == 2
    first = data[0]
    assert tokenizer.decode(first["prompt_input_ids"]) == "<s>ab"
    assert tokenizer.decode(first["chosen_input_ids"]) == "ccc</s>"
    assert tokenizer.decode(first["rejected_input_ids"]) == "rrrrr</s>"
    assert [row["length"] for row in data] == [3 + 6, 5 + 3]
    assert [row["row"] for row in data] == [0, 1]
    assert report.lines() == ["train_dataset: 2 of 2 rows kept"]


def test_rows_that_fit_exactly_are_kept_whole_and_one_token_more_is_dropped(tokenizer):
    rows = [*GOOD, *rows_of((4, 5, 3), (4, 3, 6))]
    data, report = prepare(rows, tokenizer, LengthRule(11, "drop"))
    assert [row["row"] for row in data] == list(range(20))
    assert (report.kept, report.cut, report.dropped) == (20, 0, 1)
    dropped = next(iter(report.examples.values()))[0]
    assert dropped.place == "row 20"
    assert dropped.column == "rejected"
    assert dropped.problem == (
        "is too long: 5 prompt + 7 completion tokens, max_length is 11 "
        "(raise it, or set overlong_rows: cut_prompt)"
    )


def test_cut_prompt_keeps_the_bos_the_prompts_end_and_both_completions_whole(tokenizer):
    data, report = prepare(rows_of((9, 3, 5)), tokenizer, LengthRule(11, "cut_prompt"))
    assert tokenizer.decode(data[0]["prompt_input_ids"]) == "<s>fghi"
    assert tokenizer.decode(data[0]["chosen_input_ids"]) == "ccc</s>"
    assert tokenizer.decode(data[0]["rejected_input_ids"]) == "rrrrr</s>"
    assert data[0]["length"] == 11
    assert report.lines()[1:] == ["  1 prompts cut at their beginning to fit max_length"]


@pytest.mark.parametrize("rule", ["drop", "cut_prompt"])
@pytest.mark.parametrize("limit", [5, 8, 12])
def test_no_kept_row_is_over_length_and_every_completion_keeps_its_eos(tokenizer, rule, limit):
    rows = [*rows_of(*[(1, 1, 1)] * 200), *rows_of(*[(p, c, 2) for p in (1, 9) for c in (1, 4, 9)])]
    data, report = prepare(rows, tokenizer, LengthRule(limit, rule))
    assert report.kept + report.dropped == len(rows)
    assert report.dropped + report.cut > 0
    for row in data:
        raw = rows[row["row"]]
        assert row["prompt_input_ids"][0] == tokenizer.bos_token_id
        assert len(row["chosen_input_ids"]) == len(raw["chosen"]) + 1
        for column in ("chosen_input_ids", "rejected_input_ids"):
            assert len(row["prompt_input_ids"]) + len(row[column]) <= limit
            assert row[column][-1] == tokenizer.eos_token_id


def test_cut_prompt_drops_a_row_whose_completion_leaves_no_room(tokenizer):
    rows = [*GOOD, *rows_of((2, 9, 2))]
    _, report = prepare(rows, tokenizer, LengthRule(11, "cut_prompt"))
    assert report.dropped == 1
    dropped = next(iter(report.examples.values()))[0]
    assert "3 prompt + 10 completion tokens" in dropped.problem
    assert "max_length 11 leaves no room for a prompt" in dropped.problem


def test_the_report_counts_each_kind_of_problem_and_shows_the_first_places(tokenizer, caplog):
    good = GOOD * 5
    bad = [{"prompt": "q", "chosen": "", "rejected": "b"}] * 5 + rows_of((4, 30, 2), (4, 31, 2))
    with caplog.at_level(logging.WARNING, logger="lite_orpo"):
        _, report = prepare([*good, *bad], tokenizer, LengthRule(20, "drop"))
    assert (report.kept, report.dropped) == (95, 7)
    lines = report.lines()
    assert lines[0] == "train_dataset: 95 of 102 rows kept"
    # Rows that are too long by different amounts are one kind.
    assert sorted(report.problems.values()) == [2, 5]
    assert lines[1] == (
        "  5 left out: column 'chosen' is empty or white space only (row 95, row 96, row 97, ...)"
    )
    assert lines[2].startswith("  2 left out: column 'chosen' is too long: ")
    assert lines[2].endswith("(row 100, row 101)")
    # What was left out is shown, not only kept in an object.
    assert [record.getMessage() for record in caplog.records] == [
        f"train_dataset: {line[2:]}" for line in lines[1:]
    ]


def test_more_than_a_tenth_of_bad_rows_is_an_error_that_shows_one(tokenizer):
    bad = {"prompt": "q", "chosen": "a"}
    at_the_limit = [*rows_of(*[(4, 3, 3)] * 18), bad, bad]
    assert prepare(at_the_limit, tokenizer).report.dropped == 2
    with pytest.raises(DataError) as caught:
        prepare([*at_the_limit, bad], tokenizer)
    message = str(caught.value)
    assert message.startswith("train_dataset: only 18 of 21 rows can be trained on")
    assert "3 rows like row 18: column 'rejected' is missing" in message


@pytest.mark.parametrize(
    ("shape", "rule", "column", "advice"),
    [
        ((40, 5, 2), "drop", "prompt", "raise it, or set overlong_rows: cut_prompt"),
        ((4, 30, 2), "drop", "chosen", "leaves no room for a prompt (raise max_length)"),
        ((4, 2, 30), "cut_prompt", "rejected", "leaves no room for a prompt (raise max_length)"),
    ],
)
def test_only_over_long_rows_is_an_error_with_the_remedy(tokenizer, shape, rule, column, advice):
    with pytest.raises(DataError) as caught:
        prepare(rows_of(shape), tokenizer, LengthRule(20, rule))
    assert advice in str(caught.value)
    assert (
        f"none of 1 rows can be trained on (at most 10% may be left out): row 0: column {column!r}"
        in (str(caught.value))
    )


def test_no_rows_at_all_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="train_dataset: no rows"):
        prepare([], tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    source = open_source(str(tmp_path / "empty.jsonl"), split="train")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        prepare_pairs(source, tokenizer, NO_LIMIT)


def test_on_bad_row_error_stops_at_the_first_and_names_file_line_and_column(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    path.write_text(good * 3 + "\n" + '{"prompt": "q", "chosen": null, "rejected": "b"}\n' + good)
    source = open_source(str(path), split="train")
    with pytest.raises(DataError) as caught:
        prepare_pairs(source, tokenizer, NO_LIMIT, "error")
    assert str(caught.value) == f"{path} line 5: column 'chosen' is null"


def test_special_tokens_as_text_are_counted_and_it_is_told_how_they_were_read(tokenizer):
    rows = [*GOOD, {"prompt": "say </s> twice", "chosen": "a", "rejected": "b"}]
    data, report = prepare(rows, tokenizer)
    assert tokenizer.eos_token_id not in data[19]["prompt_input_ids"]
    assert report.lines()[1:] == [
        "  1 rows have special tokens as text: kept as text (first: '</s>' at row 19)"
    ]
    written = {"prompt": "<s>a</s><s>b", "chosen": "a", "rejected": "b"}
    _, report = prepare([*rows, written, written], tokenizer)
    assert len(report.lines()) == 3
    assert report.lines()[2].startswith(
        "  2 rows of plain text begin with a special token: taken as written by a chat template"
    )
    assert report.lines()[2].endswith("(first: '</s>' at row 20)")


def test_special_tokens_that_could_not_be_kept_as_text_are_told_so():
    tokenizer = char_tokenizer(
        template="{% for m in messages %}{{ m.content[:9] }}<|im_end|>{% endfor %}"
    )
    _, report = prepare([chat_of("say </s> twice")], tokenizer)
    (line,) = report.lines()[1:]
    assert "1 rows have special tokens as text, which this tokenizer or its chat template " in line
    assert "read as control tokens" in line


def chat_of(asked):
    return {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


@pytest.mark.parametrize("shows", [True, False], ids=["template_with_tools", "without"])
def test_tools_that_the_template_does_not_write_are_counted(shows):
    tokenizer = char_tokenizer(template=CHATML + ("{{ tools }}" if shows else ""))
    tool = {"type": "function", "function": {"name": "clock"}}
    _, report = prepare([{**chat_of("hi"), "tools": [tool]}, chat_of("ho")], tokenizer)
    assert report.unwritten_rows[TOOLS] == (not shows)
    assert ("1 rows bring tools" in "".join(report.lines())) == (not shows)


def test_parts_that_the_template_leaves_out_are_counted_and_shown():
    template = "{% for m in messages if m.role != 'system' %}{{ m.content[:9] }}!{% endfor %}"
    system = {"role": "system", "content": "be kind"}
    told = {**chat_of("hi"), "prompt": [system, *chat_of("hi")["prompt"]]}
    long = {**chat_of("hi"), "chosen": [{"role": "assistant", "content": "yes, with pleasure"}]}
    _, report = prepare([told, told, long, chat_of("hi")], char_tokenizer(template=template))
    assert report.lines()[1:] == [
        "  2 rows have a system message, which the chat template does not write, or not all of it: "
        "the model never sees it",
        "  1 rows have completions of which the chat template leaves words out (thoughts, say): "
        "they are not trained on",
    ]


def test_completions_of_several_turns_are_counted_and_shown(chatml_tokenizer):
    long = chat_of("hi")
    long["rejected"] = [*long["rejected"], *chat_of("why?")["prompt"], *long["chosen"]]
    data, report = prepare([long, chat_of("hi")], chatml_tokenizer)
    assert report.lines()[1:] == [
        "  1 rows have completions of several turns: all of them is trained on, the user's words "
        "too"
    ]
    assert "why?" in chatml_tokenizer.decode(data[0]["rejected_input_ids"])


def test_a_template_that_loops_ends_the_run_at_its_row_whatever_the_policy(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = char_tokenizer(
        template=f"{{% if messages[0].content == 'loop' %}}{loop}{{% endif %}}{CHATML}"
    )
    rows = [*[chat_of("hi")] * 3, chat_of("loop"), *[chat_of("loop")] * 100]
    with pytest.raises(
        DataError, match="^train_dataset row 3: the chat template ran for"
    ) as caught:
        prepare(rows, tokenizer, on_bad_row="drop")
    assert "\n" not in str(caught.value)


def test_rows_that_the_template_refuses_are_left_out_and_shown():
    tokenizer = char_tokenizer(template="{{ 1 / (messages[0].content|length - 4) }}" + CHATML)
    _, report = prepare([*[chat_of("hi")] * 19, chat_of("four")], tokenizer)
    assert report.lines()[1] == (
        "  1 left out: column 'prompt' is refused by the chat template: ZeroDivisionError: "
        "division by zero (row 19)"
    )


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_a_bad_row_before_an_unreadable_one_comes_first(tokenizer, tmp_path, policy):
    path = tmp_path / "pairs.jsonl"
    good = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    path.write_text(good * 3 + '{"prompt": "q", "chosen": "a"}\n' + "{broken\n" + good)
    with pytest.raises(DataError) as caught:
        prepare_pairs(open_source(str(path), split="train"), tokenizer, NO_LIMIT, policy)
    assert f"line {4 if policy == 'error' else 5}" in str(caught.value)


def test_chunks_of_rows_change_nothing(tokenizer, monkeypatch):
    rows = rows_of(*[(1 + i % 9, 1 + i % 4, 6) for i in range(40)])
    rows[7:7] = [{"prompt": "q"}]
    expected = prepare(rows, tokenizer)
    for name, value in (("CHUNK_ROWS", 1), ("CHUNK_ROWS", 7), ("CHUNK_CHARACTERS", 30)):
        with monkeypatch.context() as patch:
            patch.setattr(parsed_rows, name, value)
            data, report = prepare(rows, tokenizer)
        assert list(data) == list(expected.dataset)
        assert report == expected.report


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": ["a"], "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
    ids=["a_column_missing", "of_the_wrong_shape", "good_with_a_column_more"],
)
def test_large_rows_do_not_pile_up_in_a_chunk(row, monkeypatch):
    class Text(str):
        """A string that can be watched."""

    monkeypatch.setattr(parsed_rows, "CHUNK_CHARACTERS", 10_000)
    alive = weakref.WeakSet()
    most = 0

    def located():
        nonlocal most
        for number in range(100):
            text = Text(f"{number:1000}")  # equal ones would count as one
            alive.add(text)
            most = max(most, len(alive))
            yield f"row {number}", {**row, "about": text}
            del text

    for _ in parsed_rows.parsed_chunks(located()):
        pass
    assert most < 30


def folder_of(data) -> Path:
    return Path(data.cache_files[0]["filename"]).parent


def test_token_ids_lie_in_a_mapped_file_that_goes_with_the_data_set(tokenizer):
    data, _ = prepare(GOOD, tokenizer)
    folder = folder_of(data)
    assert [path.name for path in folder.iterdir()] == ["pairs.arrow"]
    del data
    gc.collect()
    assert not folder.exists()


def test_a_failed_preparation_leaves_no_file_behind(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.tempfile, "tempdir", str(tmp_path))
    prepare(GOOD, tokenizer)  # the patch is where files go
    with pytest.raises(DataError):
        prepare([*GOOD, {"prompt": "q"}], tokenizer, on_bad_row="error")
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_more_rows_than_one_write_batch_come_back_in_order(tokenizer):
    rows = rows_of(*[(1 + i % 9, 1 + i % 4, 6) for i in range(2500)])
    data, _ = prepare(rows, tokenizer)
    assert [row["row"] for row in data] == list(range(2500))
    for i in (999, 1000, 2000, 2499):
        assert len(data[i]["chosen_input_ids"]) == 2 + i % 4


def test_without_the_datasets_package_the_ids_stay_in_a_list(tokenizer, monkeypatch):
    expected = list(prepare(GOOD, tokenizer).dataset)
    monkeypatch.setattr(preparation, "find_spec", lambda name: None)
    data = prepare(GOOD, tokenizer).dataset
    assert isinstance(data, list)
    assert data == expected


def test_completions_that_repeat_the_prompt_are_counted_and_shown(tokenizer):
    doubled = {"prompt": "Q: hi A:", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}
    _, report = prepare([*GOOD, doubled], tokenizer)
    assert "1 rows whose completions begin with the prompt again" in report.lines()[1]
