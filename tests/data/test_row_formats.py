"""Formats: rows as known data sets publish them come out as the pair that their authors meant."""

import pytest

from lite_orpo.data.formats.rows import columns_used, describe_format, parse_row
from lite_orpo.errors import RowProblem


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


ASK, GOOD, BAD = user("Why is the sky blue?"), assistant("Rayleigh."), assistant("Paint.")
SCORES = {"score_chosen": 8.5, "score_rejected": 3.0}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

KNOWN = {
    "plain": (
        {"prompt": "Q: why?\nA:", "chosen": " because", "rejected": " no"},
        "text",
        ("Q: why?\nA:", " because", " no"),
    ),
    "conversational": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        "messages",
        ([ASK], [GOOD], [BAD]),
    ),
    "trl-lib/ultrafeedback_binarized": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], **SCORES},
        "messages, implicit prompt",
        ([ASK], [GOOD], [BAD]),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": ASK["content"],
            "prompt_id": "f0e37e",
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "messages": [ASK, GOOD],
            **SCORES,
        },
        "messages, prompt also in a column",
        ([ASK], [GOOD], [BAD]),
    ),
    "HuggingFaceH4/orca_dpo_pairs": (
        {
            "prompt": ASK["content"],
            "chosen": [system("Be brief."), ASK, GOOD],
            "rejected": [system("Be brief."), ASK, BAD],
        },
        "messages, prompt also in a column",
        ([system("Be brief."), ASK], [GOOD], [BAD]),
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        {
            "source": "evol_instruct",
            "instruction": "Why?",
            "chosen_response": "Because.",
            "rejected_response": "No.",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 3.5,
            "chosen_model": "gpt-4",
        },
        "text (chosen: 'chosen_response', prompt: 'instruction', rejected: 'rejected_response')",
        ("Why?", "Because.", "No."),
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {
            "source": "evol_instruct",
            "prompt": ASK["content"],
            "chosen": [ASK, GOOD],
            "chosen-rating": 5.0,
            "chosen-model": "gpt-4",
            "rejected": [ASK, BAD],
            "rejected-rating": 3.0,
            "rejected-model": "llama",
        },
        "messages, prompt also in a column",
        ([ASK], [GOOD], [BAD]),
    ),
    "mlabonne/orpo-dpo-mix-40k, first turn as the prompt": (
        {
            "source": "Capybara",
            "chosen": [ASK, GOOD, user("And  at dusk?"), assistant("Red.")],
            "rejected": [ASK, GOOD, user("And  at dusk?"), assistant("Green.")],
            "prompt": ASK["content"] + " ",
            "question": "",
        },
        "messages, prompt also in a column",
        ([ASK, GOOD, user("And  at dusk?")], [assistant("Red.")], [assistant("Green.")]),
    ),
    "mlabonne/orpo-dpo-mix-40k, question beside the prompt": (
        {
            "source": "orca",
            "chosen": [system("Be brief."), ASK, GOOD],
            "rejected": [system("Be brief."), ASK, BAD],
            "prompt": f"Be brief.\n{ASK['content']}",
            "question": ASK["content"],
        },
        "messages, prompt also in a column",
        ([system("Be brief."), ASK], [GOOD], [BAD]),
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            "source": "Dove",
            "conversation": [{"input": ASK["content"], "output": "Rayleigh."}],
            "prompt": ASK["content"],
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "rating_chosen": 5.0,
        },
        "messages, prompt also in a column",
        ([ASK], [GOOD], [BAD]),
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
        "text beside a system or tools column, as messages (prompt: 'question')",
        ([system("Be brief."), user("Why?")], [assistant("Because.")], [assistant("No.")]),
    ),
    "Intel/orca_dpo_pairs, no system message": (
        {"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No."},
        "text beside a system or tools column, as messages (prompt: 'question')",
        ([user("Why?")], [assistant("Because.")], [assistant("No.")]),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "Be brief.", "input": "Why?", "chosen": "Because.", "rejected": "No.",
         "generations": ["Because.", "No."], "rating": [9.0, 2.0], "status": "unchanged"},
        "text beside a system or tools column, as messages (prompt: 'input')",
        ([system("Be brief."), user("Why?")], [assistant("Because.")], [assistant("No.")]),
    ),
    "Anthropic/hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
        },
        "HH-RLHF transcripts",
        ("\n\nHuman: Hi\n\nAssistant:", " Hello", " Go away"),
    ),
    "text prompt, messages": (
        {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
        "text prompt, message completions",
        ([user("Why?")], [GOOD], [BAD]),
    ),
    "message prompt, texts": (
        {"prompt": [system("s"), ASK], "chosen": " yes ", "rejected": "no"},
        "message prompt, text completions",
        ([system("s"), ASK], [assistant(" yes ")], [assistant("no")]),
    ),
    "message prompt that both completions repeat": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "messages, prompt also in a column",
        ([ASK], [GOOD], [BAD]),
    ),
    "system column beside messages": (
        {"system": "Be brief.", "prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        "messages",
        ([system("Be brief."), ASK], [GOOD], [BAD]),
    ),
    "system column that the messages repeat": (
        {"system": "s", "chosen": [system("s"), ASK, GOOD], "rejected": [system("s"), ASK, BAD]},
        "messages, implicit prompt",
        ([system("s"), ASK], [GOOD], [BAD]),
    ),
    "nulls that a table filled up": (
        {
            "prompt": [{**ASK, "tool_calls": None, "name": None}],
            "chosen": [{**GOOD, "tool_calls": None}],
            "rejected": [BAD],
            "question": None,
            "system": None,
            "tools": None,
        },
        "messages",
        ([ASK], [GOOD], [BAD]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_are_read_without_a_mapping(name):
    row, description, expected = KNOWN[name]
    parsed = parse_row(row)
    assert parsed[:3] == expected
    assert parsed.tools is None
    assert describe_format(row) == description


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "json-text"])
def test_tools_are_carried_to_the_chat_template(as_text):
    tools = '[{"type": "function", "function": {"name": "weather"}}]' if as_text else [TOOL]
    called = assistant(None, tool_calls=[{"function": {"name": "weather", "arguments": {}}}])
    row = {"prompt": [ASK], "chosen": [called], "rejected": [BAD], "tools": tools}
    parsed = parse_row(row)
    assert parsed.tools[0]["function"]["name"] == "weather"
    assert parsed.chosen[0]["content"] == ""
    assert columns_used(row)["tools"] == "tools"


def test_text_with_tools_becomes_messages():
    parsed = parse_row({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [TOOL]})
    assert parsed == ([user("q")], [assistant("a")], [assistant("b")], [TOOL])


TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
TURNS = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        pytest.param(
            {**TEXT, "question": "other"}, "question",
            "and column 'prompt' could both be the prompt, and differ; join them, or set "
            "column_mapping: {prompt: prompt}", id="two-prompts",
        ),
        pytest.param(
            {"instruction": "Sort:", "input": "3 1 2", "chosen": "a", "rejected": "b"}, "input",
            "could both be the prompt", id="alpaca-input",
        ),
        pytest.param(
            {**TEXT, "history": [["a", "b"]]}, "history", "would be left out", id="history",
        ),
        pytest.param({**TEXT, "context": "c"}, "context", "column_mapping: {prompt: prompt}",
                     id="context"),
        pytest.param({"context": "c", "chosen": "a", "rejected": "b"}, "context",
                     "column_mapping: {prompt: context}", id="context-alone"),
        pytest.param(
            {**WHOLE, "prompt": "How deep is the sea?"}, "prompt",
            "is not among the messages that both conversations begin with; to take the prompt "
            "from those, set column_mapping: {prompt: null}", id="prompt-of-another-row",
        ),
        pytest.param(
            {"prompt": ASK["content"], "chosen": [ASK, GOOD], "rejected": [user("x"), BAD]},
            "rejected", "begin with different messages", id="different-beginnings",
        ),
        pytest.param(
            {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [BAD]}, "chosen",
            "begins with a message of role 'user'", id="prompt-in-one-only",
        ),
        pytest.param(
            {"chosen": [ASK, GOOD, user("x"), GOOD], "rejected": [ASK, GOOD, user("y"), BAD]},
            "chosen", "begins with a message of role 'user'", id="parted-at-the-user",
        ),
        pytest.param(
            {"prompt": [ASK, GOOD], "chosen": "a", "rejected": "b"}, "prompt",
            "in doubt whether they go on", id="text-after-the-assistant",
        ),
        pytest.param(
            {"prompt": "", "chosen": [GOOD], "rejected": [BAD]}, "prompt",
            "share no first message", id="empty-user-message",
        ),
        pytest.param({**CHAT, "system": "s", "prompt": [system("t"), ASK]}, "system",
                     "differs from the system message", id="two-system-messages"),
        pytest.param({**TEXT, "system": 3}, "system", "must be text", id="system-number"),
        pytest.param({**TURNS, "system": "s"}, "system", "no place in a", id="hh-system"),
        pytest.param({**CHAT, "tools": "no json"}, "tools", "is text but no JSON", id="tools-text"),
        pytest.param({**CHAT, "tools": {"a": 1}}, "tools", "found an object", id="tools-object"),
        pytest.param({**CHAT, "tools": ["a"]}, "tools", "must hold objects", id="tools-of-text"),
        pytest.param(
            {"Prompt": "q", "Chosen": "a", "Rejected": "b"}, "chosen",
            "rename column 'Chosen', or set column_mapping: "
            "{prompt: Prompt, chosen: Chosen, rejected: Rejected}", id="capitals",
        ),
        pytest.param({**WHOLE, "Prompt": "q"}, "prompt", "rename column 'Prompt'",
                     id="capital-prompt-is-not-dropped"),
        pytest.param({**TEXT, "System": "s"}, "system", "rename column 'System'",
                     id="capital-system-is-not-dropped"),
        pytest.param({**TEXT, "Prompt": "r"}, "prompt", "and column 'Prompt' could both be meant",
                     id="two-spellings"),
        pytest.param({"prompt": "q", "good": "a", "bad": "b"}, "chosen",
                     "columns found: 'prompt', 'good', 'bad'; set column_", id="other-names"),
        pytest.param({**TEXT, "chosen": "[{'role': 'assistant', 'content': 'a'}]"}, "chosen",
                     "list of messages written as text", id="python-text"),
        pytest.param({**CHAT, "chosen": [{"from": "gpt", "value": "a"}]}, "chosen",
                     "'from' and 'value'", id="sharegpt"),
        pytest.param({**TEXT, "chosen": "a\ud83d"}, "chosen", "half of a character (\\ud83d",
                     id="lone-surrogate"),
        pytest.param({**TEXT, "prompt": "x" * 5_000_000}, "prompt",
                     "5,000,000 characters; a row may have 1,048,576", id="huge-text"),
        pytest.param({**CHAT, "chosen": [assistant("x" * 600_000)] * 2}, "chosen", "is too large",
                     id="huge-messages"),
        pytest.param({**CHAT, "chosen": [GOOD] * 200_000}, "chosen", "200,000 messages", id="many"),
    ],
)  # fmt: skip
def test_what_is_in_doubt_is_refused_with_the_remedy(row, column, words):
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert (caught.value.column, words in caught.value.problem) == (column, True), caught.value
    assert len(str(caught.value)) < 400


def test_a_file_with_a_system_column_is_messages_in_every_row():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for value in ("", None, "Be brief."):
        assert parse_row({**row, "system": value}).is_conversational
    assert parse_row({**row, "tools": None}).is_conversational
    assert not parse_row(row).is_conversational


def test_a_problem_names_the_column_as_it_stands_in_the_file():
    row = {"instruction": "q", "chosen_response": "a", "rejected_response": "a"}
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert caught.value.column == "rejected_response"
    assert "identical to column 'chosen_response'" in caught.value.problem


def test_nesting_without_end_is_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for row in (
        {**CHAT, "chosen": [{**GOOD, "tool_calls": deep}]},
        {**CHAT, "tools": [{"a": deep}]},
        {**CHAT, "tools": "[" * 100_000},
    ):
        with pytest.raises(RowProblem):
            parse_row(row)


def test_a_row_that_cannot_be_read_has_no_known_format():
    assert describe_format({"a": 1}) == "no known format"
    assert describe_format(["a"]) == "no known format"
