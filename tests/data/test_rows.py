"""parse_row: the accepted shapes come into one form, everything else says what is wrong."""

import pytest

from lite_orpo.data.formats.rows import parse_row
from lite_orpo.errors import RowProblem

ASK = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}


def test_plain_text_is_kept_as_it_is():
    row = parse_row({"prompt": " q ", "chosen": " a", "rejected": "b ", "source": "x"})
    assert row == (" q ", " a", "b ", None)
    assert not row.is_conversational


def test_an_empty_plain_prompt_is_accepted():
    assert parse_row({"prompt": "", "chosen": "a", "rejected": "b"}).prompt == ""


def test_an_explicit_conversational_prompt_is_kept():
    row = parse_row({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]})
    assert row == ([ASK], [GOOD], [BAD], None)
    assert row.is_conversational


@pytest.mark.parametrize("extra", [{}, {"prompt": None}], ids=["absent", "null"])
def test_an_implicit_prompt_is_what_both_conversations_begin_with(extra):
    chosen, rejected = [ASK, GOOD, ASK, GOOD], [ASK, GOOD, ASK, BAD, ASK, BAD]
    row = parse_row({"chosen": chosen, "rejected": rejected, **extra})
    assert row.prompt == [ASK, GOOD, ASK]
    assert row.chosen == [GOOD]
    assert row.rejected == [BAD, ASK, BAD]


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        (["a"], "prompt", "the row is a list, not an object"),
        ("text", "prompt", "the row is a str"),
        ({"prompt": "q", "chosen": "a"}, "rejected", "columns found: 'prompt', 'chosen'"),
        ({"prompt": "q", "Chosen ": "a", "rejected": "b"}, "chosen", "rename column 'Chosen '"),
        ({**PLAIN, "chosen": None}, "chosen", "is null"),
        ({**PLAIN, "chosen": 3}, "chosen", "found a number"),
        ({**PLAIN, "chosen": True}, "chosen", "found a boolean"),
        ({**PLAIN, "rejected": {"a": 1}}, "rejected", "found an object"),
        ({**PLAIN, "prompt": 3.5}, "prompt", "found a number"),
        ({**PLAIN, "prompt": {}}, "prompt", "found an object"),
        ({**PLAIN, "chosen": ""}, "chosen", "is empty or white space only"),
        ({**PLAIN, "rejected": " \n\t"}, "rejected", "is empty or white space only"),
        ({**PLAIN, "rejected": "a"}, "rejected", "identical"),
        ({"chosen": "q a", "rejected": "q b"}, "prompt", "plain text gives no sign"),
        ({**PLAIN, "chosen": [GOOD]}, "rejected", "same kind as column 'chosen'"),
        ({**CHAT, "prompt": []}, "prompt", "empty list"),
        ({**CHAT, "chosen": []}, "chosen", "empty list"),
        ({**CHAT, "chosen": ["hello"]}, "chosen", "'role' and 'content'"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "chosen", "'role' and 'content'"),
        ({**CHAT, "chosen": [{"role": "robot", "content": "x"}]}, "chosen", "role 'robot'"),
        ({**CHAT, "chosen": [{**GOOD, "content": None}]}, "chosen", "content is null"),
        ({**CHAT, "chosen": [{**GOOD, "content": [{"text": "x"}]}]}, "chosen", "content is a list"),
        ({**CHAT, "chosen": [{**GOOD, "content": " "}]}, "chosen", "white space only"),
        ({**CHAT, "rejected": [GOOD]}, "rejected", "identical"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "share no first message"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "rejected", "adds no message"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "rejected", "adds no message"),
    ],
)
def test_what_cannot_be_trained_on_is_named(row, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert caught.value.column == column
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        pytest.param(
            {
                "prompt": [{"role": "user", "content": "hi"}],
                "chosen": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "a"},
                ],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            "chosen",
            "begins with the messages of column 'prompt' again",
            id="prompt-twice",
        ),
        pytest.param(
            {
                "prompt": [{"role": "user", "content": "hi"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "b"}],
            },
            "rejected",
            "not with the assistant's answer",
            id="user-last",
        ),
    ],
)
def test_a_conversation_without_a_border_is_no_pair(row, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert caught.value.column == column
    assert words in caught.value.problem
