"""Each finding of `lite-orpo check`: found where the data has it, silent where it has not."""

import pytest
from pairs_with_findings import clean_rows, source_of, swapped

from lite_orpo.data.inspection.finding import Severity
from lite_orpo.data.inspection.survey import SurveyOptions, survey_pairs
from lite_orpo.data.preparation import LengthRule, prepare_pairs
from lite_orpo.errors import DataError


def messages(row):
    chat = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    for column in ("chosen", "rejected"):
        chat[column] = [{"role": "assistant", "content": row[column]}]
    return chat


def with_copies(rows):
    return rows + rows[4:7]


def with_swaps(rows):
    return rows + [swapped(row) for row in rows[4:7]]


def with_repeated_prompts(rows):
    return rows + [{**row, "chosen": f"{row['chosen']} anew"} for row in rows[4:7]]


def with_mixed_formats(rows):
    return rows[:-3] + [messages(row) for row in rows[-3:]]


def with_empty_prompts(rows):
    return rows[:-3] + [{**row, "prompt": " "} for row in rows[-3:]]


def with_prompts_again(rows):
    return rows[:-3] + [
        {**r, "chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]}
        for r in rows[-3:]
    ]


def with_long_chosen(rows):
    return [{**row, "chosen": f"{row['chosen']} and {row['rejected']}"} for row in rows]


def with_one_opening(rows):
    return [{**row, "chosen": f"Sure {row['chosen']}"[: len(row["chosen"])]} for row in rows]


def with_one_source(rows):
    return [{**row, "source": "a" if i % 20 else "b"} for i, row in enumerate(rows)]


def with_rare_categories(rows):
    return [{**row, "category": "c" if i == 7 else "ab"[i % 2]} for i, row in enumerate(rows)]


def with_special_tokens(rows):
    return rows[:-3] + [{**row, "chosen": f"{row['chosen']} <|im_end|>"} for row in rows[-3:]]


def with_odd_characters(rows):
    return rows[:-3] + [{**row, "prompt": f"{row['prompt']} \u202e\x00"} for row in rows[-3:]]


def with_empty_answers(rows):
    return rows[:-3] + [{**row, "chosen": " "} for row in rows[-3:]]


def with_identical_answers(rows):
    return rows[:-3] + [{**row, "chosen": row["rejected"]} for row in rows[-3:]]


def with_numbers(rows):
    return rows[:-3] + [{**row, "chosen": 4} for row in rows[-3:]]


def with_half_characters(rows):
    return rows[:-3] + [{**row, "rejected": f"{row['rejected']} \ud83d"} for row in rows[-3:]]


CASES = {
    "duplicate_pairs": (with_copies, 3),
    "swapped_pairs": (with_swaps, 3),
    "repeated_prompts": (with_repeated_prompts, 3),
    "mixed_formats": (with_mixed_formats, 3),
    "empty_prompts": (with_empty_prompts, 3),
    "prompt_in_completions": (with_prompts_again, 3),
    "length_gives_it_away": (with_long_chosen, 200),
    "first_token_gives_it_away": (with_one_opening, 200),
    "one_category_dominates": (with_one_source, 190),
    "rare_categories": (with_rare_categories, 1),
    "special_tokens_in_text": (with_special_tokens, 3),
    "odd_characters": (with_odd_characters, 3),
    "empty_texts": (with_empty_answers, 3),
    "identical_pairs": (with_identical_answers, 3),
    "unreadable_rows": (with_numbers, 3),
    "unreadable_rows: half a character": (with_half_characters, 3),
}


def findings_of(rows, **arguments):
    return {f.id: f for f in survey_pairs(source_of(rows), **arguments).findings}


def test_clean_pairs_have_no_finding():
    assert findings_of(clean_rows()) == {}


@pytest.mark.parametrize("name", CASES)
def test_a_finding_is_found_with_its_rows(name):
    spoil, count = CASES[name]
    found = findings_of(spoil(clean_rows()))
    name = name.split(":")[0]
    assert set(found) == {name}, "one thing is wrong, and nothing else is said to be"
    finding = found[name]
    assert finding.rows == count
    assert len(finding.places) == min(count, 3)
    assert all(place.startswith("row ") for place in finding.places)
    assert finding.title and finding.harm.endswith(".") and finding.advice.endswith(".")


def test_the_rows_named_are_the_rows_that_have_it():
    found = findings_of(with_copies(clean_rows()))
    assert found["duplicate_pairs"].places == (
        "row 200 (as row 4)",
        "row 201 (as row 5)",
        "row 202 (as row 6)",
    )
    found = findings_of(with_swaps(clean_rows()))
    assert found["swapped_pairs"].places[0] == "row 200 (against row 4)"
    assert findings_of(with_odd_characters(clean_rows()))["odd_characters"].places == (
        "row 197",
        "row 198",
        "row 199",
    )


def test_a_prompt_counts_as_the_same_as_text_and_as_a_message():
    rows = clean_rows()
    assert "duplicate_pairs" in findings_of([*rows, messages(rows[0])])


def test_tool_calls_tell_two_answers_apart():
    def call(name):
        return {"role": "assistant", "content": "", "tool_calls": [{"name": name}]}

    final = {"role": "assistant", "content": "done"}
    rows = [
        {
            "prompt": [{"role": "user", "content": "Ring?"}],
            "chosen": [call(name), final],
            "rejected": [call("none"), final],
        }
        for name in ("bell", "phone")
    ]
    assert "duplicate_pairs" not in findings_of(rows)


def test_held_out_prompts_that_are_trained_on_are_found():
    rows, held_out = clean_rows(), clean_rows(50, seed=1)
    assert "prompts_in_both" not in findings_of(rows, held_out=source_of(held_out, "held-out"))
    both = [*held_out, rows[3], {**rows[4], "chosen": "another"}]
    finding = findings_of(rows, held_out=source_of(both, "held-out"))["prompts_in_both"]
    assert finding.rows == 2 and finding.places == ("row 50", "row 51")
    assert finding.severity is Severity.SERIOUS


def test_held_out_rows_that_cannot_be_read_are_found():
    held_out = [*clean_rows(50, seed=1), {"prompt": "a"}]
    found = findings_of(clean_rows(), held_out=source_of(held_out, "held-out"))
    assert set(found) == {"held_out_unreadable_rows"}
    assert found["held_out_unreadable_rows"].places == ("row 50",)


def test_held_out_rows_that_training_refuses_are_a_serious_finding(tokenizer):
    long = [{**row, "prompt": row["prompt"] * 40} for row in clean_rows(30, seed=1)]
    for rule, is_refused in (("drop", True), ("cut_prompt", False)):
        options = SurveyOptions(LengthRule(200, rule))
        arguments = {"tokenizer": tokenizer, "options": options}
        survey = survey_pairs(source_of(clean_rows()), held_out=source_of(long), **arguments)
        found = {f.id: f for f in survey.findings}
        assert found["held_out_overlong"].rows == 30
        assert ("held_out_training_refused" in found) == survey.is_serious == is_refused
        assert survey.held_out.overlong == (30 if is_refused else 0)
        if is_refused:
            with pytest.raises(DataError, match="none of 30 rows"):
                prepare_pairs(source_of(long), tokenizer, options.rule)


def test_held_out_pairs_of_an_empty_file_are_a_serious_finding():
    survey = survey_pairs(source_of(clean_rows()), held_out=source_of([]))
    assert [f.id for f in survey.findings] == ["held_out_empty"] and survey.is_serious


def test_each_bad_row_is_serious_where_training_stops_at_the_first(tokenizer):
    rows = clean_rows()
    rows[3]["prompt"] *= 40
    rows[5]["chosen"] = None
    for on_bad_row, severity in (("drop", Severity.WARNING), ("error", Severity.SERIOUS)):
        options = SurveyOptions(LengthRule(200, "drop"), on_bad_row)
        found = findings_of(rows, held_out=source_of(rows), tokenizer=tokenizer, options=options)
        for name in ("overlong", "unreadable_rows"):
            for finding in (found[name], found[f"held_out_{name}"]):
                assert finding.severity is severity
                assert ("Training stops at the first" in finding.harm) == (on_bad_row == "error")
    options = SurveyOptions(LengthRule(200, "cut_prompt"), "error")
    found = findings_of(rows, tokenizer=tokenizer, options=options)
    assert found["overlong"].severity is Severity.WARNING, "nothing is left out"


def test_rows_over_max_length_are_found(tokenizer):
    rows = clean_rows()
    for row in rows[:3]:
        row["prompt"] *= 40
    rows[3]["chosen"] *= 40
    for rule in ("drop", "cut_prompt"):
        options = SurveyOptions(LengthRule(200, rule))
        survey = survey_pairs(source_of(rows), tokenizer=tokenizer, options=options)
        (finding,) = (f for f in survey.findings if f.id == "overlong")
        assert finding.rows == 4
        assert survey.overlong[2:] == (4, 3, 1)
        assert survey.overlong.dropped == (4 if rule == "drop" else 1)
    options = SurveyOptions(LengthRule(4000, "drop"))
    assert "overlong" not in findings_of(rows, tokenizer=tokenizer, options=options)


@pytest.mark.parametrize("bad", [20, 25])
def test_data_that_training_will_refuse_is_called_so(bad):
    rows = clean_rows(200)
    found = findings_of([{**row, "chosen": None} for row in rows[:bad]] + rows[bad:])
    assert ("training_refused" in found) == (bad > 20)
    is_serious = found["unreadable_rows"].severity is Severity.SERIOUS
    assert is_serious == (bad >= 20)


def test_special_tokens_are_those_of_the_tokenizer(chatml_tokenizer):
    rows = clean_rows()
    foreign = rows[:-1] + [{**rows[-1], "chosen": "a [INST] b"}]
    assert "special_tokens_in_text" in findings_of(foreign)
    assert "special_tokens_in_text" not in findings_of(foreign, tokenizer=chatml_tokenizer)
    own = rows[:-1] + [{**rows[-1], "chosen": "a <|im_start|> b"}]
    finding = findings_of(own, tokenizer=chatml_tokenizer)["special_tokens_in_text"]
    assert "<|im_start|>" in finding.title


def test_an_eos_that_ends_an_answer_is_no_special_token_in_text(chatml_tokenizer):
    eos = chatml_tokenizer.eos_token
    rows = clean_rows()
    ended = [{**r, "chosen": r["chosen"] + eos, "rejected": r["rejected"] + eos} for r in rows]
    assert findings_of(ended, tokenizer=chatml_tokenizer) == {}
    ended[4]["chosen"] = f"yes {eos} no{eos}"
    finding = findings_of(ended, tokenizer=chatml_tokenizer)["special_tokens_in_text"]
    assert finding.rows == 1 and finding.places == ("row 4",)


def test_special_tokens_are_told_with_how_training_reads_them(chatml_tokenizer):
    rows = clean_rows()
    rows[1]["chosen"] += " <|im_start|> x"
    rows[2]["prompt"] = f"<|im_start|>user {rows[2]['prompt']}"
    finding = findings_of(rows, tokenizer=chatml_tokenizer)["special_tokens_in_text"]
    report = prepare_pairs(source_of(rows), chatml_tokenizer, LengthRule(None, "drop")).report
    for reading, count in report.special_text_rows.items():
        assert f"{count} {reading}" in finding.title
    assert len(report.special_text_rows) == 2 and finding.rows == 2


def test_a_column_of_row_numbers_is_no_category():
    rows = [{**row, "source": f"row {i}"} for i, row in enumerate(clean_rows())]
    survey = survey_pairs(source_of(rows))
    assert survey.categories == () and survey.findings == ()


def test_many_values_do_not_fill_the_memory():
    rows = [{**row, "source": f"{i % 300}"} for i, row in enumerate(clean_rows(900))]
    assert survey_pairs(source_of(rows)).categories == ()
