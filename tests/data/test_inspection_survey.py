"""The survey's figures against what they must be, its limits, and rows that nobody expects."""

import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_with_findings import WORDS, clean_rows, source_of, swapped
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data.files.column_mapping import with_mapped_columns
from lite_orpo.data.files.sources import LocatedRow, RowSource, open_source
from lite_orpo.data.formats.rows import parse_row
from lite_orpo.data.inspection.overlong import fate
from lite_orpo.data.inspection.seen_row import RowReader
from lite_orpo.data.inspection.shortcuts import wilson_interval
from lite_orpo.data.inspection.survey import SurveyOptions, survey_pairs
from lite_orpo.data.preparation import LengthRule, prepare_pairs
from lite_orpo.data.tokens.tokenization import tokenize_pair
from lite_orpo.errors import DataError, UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rule", ["drop", "cut_prompt"])
@pytest.mark.parametrize("max_length", [None, 30, 50, 64, 80])
def test_fates_are_those_of_the_preparation(tokenizer, rule, max_length):
    rows = clean_rows(60)
    for i, row in enumerate(rows):
        row["prompt"] = row["prompt"] * (1 + i % 4)
    reader = RowReader()
    parsed = [parse_row(row) for row in rows]
    seen = [reader.see("", row, row, tokenize_pair(row, tokenizer)) for row in parsed]
    met = Counter(fate(row.sizes, max_length) for row in seen)
    dropped = met["dropped"] + (met["too long"] if rule == "drop" else 0)
    try:
        report = prepare_pairs(source_of(rows), tokenizer, LengthRule(max_length, rule)).report
    except DataError:
        assert dropped > 6
        return
    assert (report.dropped, report.cut) == (dropped, 0 if rule == "drop" else met["too long"])


def test_lengths_are_in_the_trainers_tokens(chatml_tokenizer):
    rows = [
        {
            "prompt": [{"role": "user", "content": "a" * i}],
            "chosen": [{"role": "assistant", "content": "b" * (2 * i)}],
            "rejected": [{"role": "assistant", "content": "c"}],
        }
        for i in range(1, 40)
    ]
    survey = survey_pairs(source_of(rows), tokenizer=chatml_tokenizer)
    prepared = prepare_pairs(source_of(rows), chatml_tokenizer, LengthRule(None, "drop")).dataset
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(row[f"{name}_input_ids"]) for row in prepared]
        summary = survey.lengths[name]
        assert summary.longest == max(lengths)
        assert summary.mean == pytest.approx(sum(lengths) / len(lengths))
        assert summary.median == sorted(lengths)[(len(lengths) - 1) // 2]
        assert sum(summary.histogram.counts) == len(rows)
    assert survey.unit == "tokens"
    assert survey_pairs(source_of(rows)).unit == "characters"


def test_intervals_hold_one_half_where_nothing_gives_the_answer_away():
    """Of 60 data sets, 95 % intervals of two rules: about 6 misses of 120 are chance's share."""
    missed = 0
    for seed in range(60):
        survey = survey_pairs(source_of(clean_rows(150, seed)))
        for rule in (survey.length_rule, survey.first_token_rule):
            missed += not rule.low <= 0.5 <= rule.high
    assert missed <= 12


def test_a_rule_is_not_praised_for_what_it_has_learnt_by_heart():
    """Every first word is new: a rule tried on its own half would be right everywhere."""
    rows = [{"prompt": f"{i}", "chosen": f"yes{i} a", "rejected": f"no{i} b"} for i in range(400)]
    rule = survey_pairs(source_of(rows)).first_token_rule
    assert rule.accuracy == 0.5


def test_a_rule_finds_the_accuracy_that_was_put_in():
    dice = random.Random(3)
    rows = []
    for i, row in enumerate(clean_rows(4000)):
        short, long = sorted((row["chosen"], row["rejected"] + " x"), key=len)
        is_longer = dice.random() < 0.7
        pair = {"prompt": f"{i}", "chosen": long + "!", "rejected": short}
        rows.append(pair if is_longer else swapped(pair))
    rule = survey_pairs(source_of(rows)).length_rule
    assert rule.low < 0.7 < rule.high


def test_copies_do_not_narrow_the_interval():
    rows = clean_rows(300)
    once, often = (survey_pairs(source_of(rows * times)) for times in (1, 5))
    assert once.length_rule == often.length_rule
    assert once.first_token_rule == often.first_token_rule


def test_many_pairs_of_few_prompts_are_few_witnesses():
    rows = [{**row, "prompt": f"{i % 60}"} for i, row in enumerate(clean_rows(1200))]
    rule = survey_pairs(source_of(rows)).length_rule
    assert rule.pairs > 400 and rule.prompts < 60
    assert rule.high - rule.low > 0.2


def test_too_few_prompts_have_no_accuracy():
    survey = survey_pairs(source_of(clean_rows(20)))
    assert survey.length_rule is None and survey.first_token_rule is None


def test_wilsons_interval_is_the_textbooks():
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson_interval(1.0, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_file_that_breaks_off_is_surveyed_up_to_there(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    survey = survey_pairs(open_source(str(path), split="train"))
    assert survey.readable == 1 and "line 2" in survey.stopped
    assert survey.findings[0].id == "unreadable_file"
    path.write_text('{"prompt": \n')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        survey_pairs(open_source(str(path), split="train"))


def test_nothing_to_read_is_one_error():
    with pytest.raises(DataError, match="no rows"):
        survey_pairs(source_of([]))
    with pytest.raises(DataError, match="none of 2 rows .* row 0: column 'rejected' is missing"):
        survey_pairs(source_of([{"prompt": "a", "chosen": "b"}] * 2))


def test_an_unknown_column_to_count_by_is_an_error():
    with pytest.raises(DataError, match="no column 'topic' .* columns found: 'prompt'"):
        survey_pairs(source_of(clean_rows(5)), options=SurveyOptions(balance_column="topic"))


def test_rows_without_the_column_to_count_by_are_counted_as_none():
    rows = [{**row, "topic": "ab"[i % 2]} for i, row in enumerate(clean_rows(20))]
    del rows[0]["topic"]
    survey = survey_pairs(source_of(rows), options=SurveyOptions(balance_column="topic"))
    assert {c.value: c.rows for c in survey.categories} == {"b": 10, "a": 9, "(none)": 1}


@pytest.mark.parametrize("column", ["system", "persona"])
def test_a_mapped_column_can_be_counted_by_under_both_names(column):
    def messages(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": messages("user", row["prompt"]),
            "chosen": messages("assistant", row["chosen"]),
            "rejected": messages("assistant", row["rejected"]),
            "persona": ["kind", "curt"][i % 2],
        }
        for i, row in enumerate(clean_rows(20))
    ]
    source = with_mapped_columns(source_of(rows), {"system": "persona"})
    survey = survey_pairs(source, options=SurveyOptions(balance_column=column))
    assert {c.value: c.rows for c in survey.categories} == {"kind": 10, "curt": 10}
    with pytest.raises(DataError, match="columns found: 'prompt', .*'persona'"):
        survey_pairs(source, options=SurveyOptions(balance_column="topic"))


def test_limits_end_the_pass():
    rows = clean_rows(50)
    survey = survey_pairs(source_of(rows), options=SurveyOptions(max_rows=10))
    assert survey.rows == 10 and survey.is_part
    survey = survey_pairs(source_of(rows), options=SurveyOptions(max_rows=50))
    assert survey.rows == 50 and not survey.is_part

    def slow():
        yield LocatedRow("row 0", rows[0])
        while True:
            yield LocatedRow("row", rows[1])

    source = RowSource("endless", slow, None)
    assert survey_pairs(source, options=SurveyOptions(max_seconds=0.2)).is_part


def test_memory_does_not_grow_with_the_texts():
    """Beyond the texts of one chunk of rows: 500 bytes a row."""

    def rows_of(count):
        def read():
            for i in range(count):
                yield LocatedRow(
                    f"row {i}", {"prompt": f"{i}" * 2000, "chosen": "a " * 2000, "rejected": "b"}
                )

        return RowSource("made", read, None)

    peaks = []
    for count in (1000, 4000):
        tracemalloc.start()
        survey_pairs(rows_of(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3000 * 1000, "of 30 MB of text"
    assert peaks[0] < 12e6, "a chunk is 256 rows of 10 kB"


HASHED = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/data"]
from pairs_with_findings import clean_rows, source_of
from lite_orpo.data.inspection.survey import survey_pairs
from lite_orpo.report.check_json import as_json
rows = clean_rows(300)
for i, row in enumerate(rows):
    row["source"] = "abcdefgh"[i % 8]
    row["prompt"] += ["", " <s> </s> [INST] <eos>", " \\x01\\x02"][i % 3]
    row["extra" + str(i % 5)] = i
print(json.dumps(as_json(survey_pairs(source_of(rows)), None)))
"""


def test_nothing_depends_on_the_hash_seed():
    texts = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", HASHED.format(root=str(ROOT))],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1


TOKENIZER = char_tokenizer(template=CHATML)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["<|im_end|>", "\ud800", "\x00", "\u202e", " ", "</s>", "a"]),
    st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join),
)
SCALARS = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats())
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "usr"]), "content": SCALARS}
        ),
        SCALARS,
        st.dictionaries(TEXTS, SCALARS, max_size=2),
    ),
    max_size=3,
)
VALUES = st.one_of(TEXTS, MESSAGES, SCALARS, st.dictionaries(TEXTS, SCALARS, max_size=2))
ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}),
    st.fixed_dictionaries(
        {"chosen": VALUES, "rejected": VALUES},
        optional={"prompt": VALUES, "source": VALUES, "category": VALUES},
    ),
    st.dictionaries(TEXTS, VALUES, max_size=3),
    VALUES,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, max_size=6), st.booleans())
def test_no_rows_give_anything_but_a_survey_or_a_users_error(rows, has_tokenizer):
    from lite_orpo.report.check_json import as_json
    from lite_orpo.report.check_page import page_of

    try:
        survey = survey_pairs(
            source_of(rows),
            held_out=source_of(rows[::-1], "held-out"),
            tokenizer=TOKENIZER if has_tokenizer else None,
            options=SurveyOptions(LengthRule(16, "drop")),
        )
    except UserError:
        return
    assert survey.readable + survey.unreadable == len(rows)
    page_of(survey, "model").encode("utf-8")
    assert as_json(survey, None)["data"]["rows"] == len(rows)
    for finding in survey.findings:
        assert len(finding.places) <= 3


def test_the_longest_lengths_are_rounded_to_three_figures():
    rows = [
        {"prompt": "p", "chosen": "a" * 123_456, "rejected": "b"},
        {"prompt": "q", "chosen": "a" * 123_499, "rejected": "b"},
    ]
    summary = survey_pairs(source_of(rows)).lengths["chosen"]
    assert summary.longest == 123_499 and summary.median == 123_000
    assert math.isclose(summary.mean, 123_477.5)
