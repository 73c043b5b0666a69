"""Formats in doubt: no prompt is lost or doubled, and no messages are trained on as text."""

import json

import pytest

from lite_orpo.data.formats.rows import columns_used, parse_row
from lite_orpo.errors import RowProblem


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


ASK, GOOD, BAD = user("Why is the sky blue?"), assistant("Rayleigh."), assistant("Paint.")
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        pytest.param({**TEXT, "messages": [user("before")]}, "messages",
                     "column_mapping: {messages: null}", id="messages"),
        pytest.param({"messages": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "messages",
                     "column_mapping: {prompt: messages}", id="messages-alone"),
        pytest.param({**CHAT, "conversation_history": [[ASK["content"], "Hm."]]},
                     "conversation_history", "would be left out", id="conversation-history"),
        pytest.param({**WHOLE, "document": "The sky is wide."}, "document",
                     "would be left out; put it into the prompt, leave it out by column_mapping: "
                     "{document: null}", id="document"),
        pytest.param({**TEXT, "system": "s", "system_prompt": "t"}, "system_prompt",
                     "and column 'system' could both be the system message, and differ; join them, "
                     "or set column_mapping: {system: system}", id="two-system-columns"),
        pytest.param(
            {"prompt": [ASK, GOOD], "chosen": [assistant("c")], "rejected": [BAD]}, "prompt",
            "in doubt whether they go on", id="messages-after-the-assistant",
        ),
        pytest.param(
            {"prompt": [ASK, assistant("")], "chosen": [GOOD], "rejected": [BAD]}, "prompt",
            "in doubt whether they go on", id="messages-after-an-empty-answer",
        ),
    ],
)  # fmt: skip
def test_what_may_be_more_of_the_prompt_is_refused_with_the_remedy(row, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert (caught.value.column, words in caught.value.problem) == (column, True), caught.value
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Context: it is green.\n\nQuestion: What color is it?", "What color is it?"),
        ("Which hippo is number 0? Explain", "hi"),
        ("hi", "Which hippo is number 0? Explain"),
    ],
    ids=["context-lost", "message-in-the-prompt", "prompt-in-a-message"],
)
def test_a_prompt_that_the_messages_do_not_say_whole_is_refused(prompt, said):
    row = {"prompt": prompt, "chosen": [user(said), GOOD], "rejected": [user(said), BAD]}
    with pytest.raises(RowProblem, match="set column_mapping: {prompt: null}") as caught:
        parse_row(row)
    assert caught.value.column == "prompt"


@pytest.mark.parametrize(
    "prompt",
    ["Be brief.  Why is the sky blue?", "Why is the sky blue?\n Answer in one word:", "One word:"],
    ids=["joined", "long-part", "a-line"],
)
def test_a_prompt_that_the_messages_say_whole_is_accepted(prompt):
    said = ["Be brief.", "Why is the sky blue?\nAnswer in one word: yes or no\nOne word:"]
    asked = [system(said[0]), user(ASK["content"] if prompt.startswith("Be") else said[1])]
    row = {"prompt": prompt, "chosen": [*asked, GOOD], "rejected": [*asked, BAD]}
    assert parse_row(row)[:3] == (asked, [GOOD], [BAD])


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    "value",
    [[GOOD], [ASK, GOOD], GOOD, [{"from": "gpt", "value": "a"}], {"from": "gpt", "value": "a"}],
    ids=["list", "two", "object", "sharegpt", "sharegpt-object"],
)
@pytest.mark.parametrize("indent", [None, 1], ids=["compact", "indented"])
def test_messages_written_as_json_text_are_refused_in_any_layout(column, value, indent):
    row = {**TEXT, column: f"\n{json.dumps(value, indent=indent)} "}
    with pytest.raises(RowProblem, match="messages written as text; store it as a list") as caught:
        parse_row(row)
    assert caught.value.column == column


@pytest.mark.parametrize(
    "answer",
    ['{"role": "admin", "rights": []}', '[{"from": "Rome", "to": "Ulm"}]', "[1, 2]", "{a}", "[]"],
)
def test_an_answer_that_is_json_of_something_else_stays_text(answer):
    assert parse_row({**TEXT, "chosen": answer}).chosen == answer


def test_arguments_of_a_tool_call_may_be_json_with_from_and_value():
    call = {"function": {"name": "pay", "arguments": '{"from": "a", "value": 3}'}}
    row = {**CHAT, "chosen": [assistant(None, tool_calls=[call])]}
    assert parse_row(row).chosen[0]["tool_calls"] == [call]


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "messages": [ASK, GOOD]},
        {**WHOLE, "messages": [{"from": "human", "value": ASK["content"]}]},
        {**TEXT, "prompt": "The sky is wide as the sea.\nHow wide?", "context": "The sky is wide as"
         " the sea. "},
        {**WHOLE, "document": None, "context": " \n", "history": [[]]},
    ],
    ids=["messages", "sharegpt", "context-in-the-prompt", "blank"],
)  # fmt: skip
def test_a_column_that_repeats_what_is_said_or_says_nothing_is_left_out(row):
    plain = {part: row[part] for part in ("prompt", "chosen", "rejected") if part in row}
    assert parse_row(row) == parse_row(plain)


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_found_by_its_usual_names(column):
    others = {"system": None, "system_prompt": " ", column: "Be brief."}
    assert parse_row({**TEXT, **others}).prompt == [system("Be brief."), user("q")]
    assert columns_used({**TEXT, **others})["system"] == column


def test_two_system_columns_that_say_the_same_are_one():
    row = {**TEXT, "system_prompt": "Be brief.", "system_message": "Be brief. "}
    assert parse_row(row).prompt == [system("Be brief."), user("q")]
