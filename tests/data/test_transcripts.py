"""HH-RLHF transcripts: the border is the last turn both share, and no character is lost."""

import pytest

from lite_orpo.data.formats.rows import parse_row
from lite_orpo.errors import RowProblem

FIRST = "\n\nHuman: Is tea healthy?\n\nAssistant: Mostly.\n\nHuman: And coffee?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (FIRST + " In measure.", FIRST + " No!", FIRST),
        (FIRST + " In measure.", FIRST + " In large cups.", FIRST),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant: Go", None),
        # Parted at the first answer already: what follows belongs to the completions.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z",
            "\n\nHuman: a\n\nAssistant:",
        ),
        # One ends where the other goes on.
        (FIRST + " Yes\n\nHuman: ok\n\nAssistant: Fine", FIRST + " Yes", FIRST),
        # An answer that begins with the person's label is odd, but is one.
        (FIRST + " Human: no", FIRST + " yes", FIRST),
    ],
    ids=["two-turns", "shared-words", "one-turn", "parted-early", "longer", "label-in-answer"],
)
def test_prompt_and_completions_are_the_original_text(chosen, rejected, prompt):
    row = parse_row({"chosen": chosen, "rejected": rejected})
    assert row.prompt.endswith("\n\nAssistant:")
    assert row.prompt == (prompt or row.prompt)
    assert row.prompt + row.chosen == chosen
    assert row.prompt + row.rejected == rejected
    assert not row.is_conversational


@pytest.mark.parametrize("prompt", [None, "", " \n"], ids=["null", "empty", "blank"])
def test_an_empty_prompt_column_does_not_make_the_transcript_a_completion(prompt):
    row = parse_row({"prompt": prompt, "chosen": FIRST + " Yes", "rejected": FIRST + " No"})
    assert row.prompt == FIRST


@pytest.mark.parametrize(
    ("chosen", "rejected", "column", "words"),
    [
        (FIRST + " Yes", FIRST + " ", "rejected", "has an empty last answer"),
        (FIRST + "\n\nHuman: hm", FIRST + " b", "chosen", "an empty answer before the person"),
        (FIRST + " Yes", FIRST + " Yes", "rejected", "identical"),
        (FIRST + " Yes", "\n\nHuman: Else\n\nAssistant: No", "prompt", "no beginning that both"),
        (FIRST + " Yes", "Go away", "prompt", "no beginning that both transcripts share"),
    ],
    ids=["empty", "no-answer", "identical", "other-question", "no-transcript"],
)
def test_a_pair_of_transcripts_without_a_border_is_refused(chosen, rejected, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row({"chosen": chosen, "rejected": rejected})
    assert caught.value.column == column
    assert words in caught.value.problem


def test_a_transcript_with_a_prompt_column_is_plain_text():
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    row = parse_row({"prompt": prompt, "chosen": " Hello", "rejected": " Go"})
    assert row[:3] == (prompt, " Hello", " Go")


@pytest.mark.parametrize(
    "prompt",
    [FIRST, FIRST.strip(), "Is tea healthy?", "Human: Is tea healthy?",
     "\n\nHuman: Is tea healthy?\n\nAssistant:"],
    ids=["whole", "stripped", "question", "marked", "first-turn"],
)  # fmt: skip
def test_a_prompt_that_the_transcripts_begin_with_is_not_doubled(prompt):
    row = parse_row({"prompt": prompt, "chosen": FIRST + " Yes", "rejected": FIRST + " No"})
    assert row[:3] == (FIRST, " Yes", " No")


@pytest.mark.parametrize(
    "prompt",
    ["Is tea", "Be kind.", FIRST + " Yes", [{"role": "user", "content": "Is tea healthy?"}]],
    ids=["half-a-turn", "other", "with-an-answer", "messages"],
)
def test_a_prompt_beside_transcripts_that_do_not_begin_with_it_is_refused(prompt):
    with pytest.raises(RowProblem, match="{prompt: null}") as caught:
        parse_row({"prompt": prompt, "chosen": FIRST + " Yes", "rejected": FIRST + " No"})
    assert caught.value.column == "prompt"
