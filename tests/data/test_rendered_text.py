"""Text columns that a chat template has written, prompt and all, are parted where the answer is."""

import pytest
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data.preference_row import PreferenceRow
from lite_orpo.data.tokens.rendered_text import generation_prompt
from lite_orpo.data.tokens.tokenization import (
    KEPT_AS_TEXT,
    READ_AS_WRITTEN_BY_A_TEMPLATE,
    RowTokenizer,
    tokenize_pair,
)
from lite_orpo.errors import RowProblem

TOKENIZER = char_tokenizer(template=CHATML)
SYSTEM = [{"role": "system", "content": "Be kind."}]
ASKED = [{"role": "user", "content": "What is tea?"}]
TURNS = [*ASKED, {"role": "assistant", "content": "A leaf."}, {"role": "user", "content": "Hot?"}]


def answered(prompt, answer):
    return [*prompt, {"role": "assistant", "content": answer}]


def text(messages, **options):
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


def rendered(prompt_column, messages, good="Good.", bad="Goo!"):
    texts = (text(answered(messages, answer)) for answer in (good, bad))
    return PreferenceRow(prompt_column, *texts)


@pytest.mark.parametrize("messages", [ASKED, [*SYSTEM, *ASKED], TURNS], ids=["one", "system", "3"])
@pytest.mark.parametrize("column", ["What is tea?", "as the template writes it"])
def test_it_is_what_the_messages_are(messages, column):
    as_text = text(messages, add_generation_prompt=True)
    row = rendered(column if column == "What is tea?" else as_text, messages)
    as_messages = PreferenceRow(
        messages,
        [{"role": "assistant", "content": "Good."}],
        [{"role": "assistant", "content": "Goo!"}],
    )
    assert tokenize_pair(row, TOKENIZER) == tokenize_pair(as_messages, TOKENIZER)
    outcome = RowTokenizer(TOKENIZER).rows([row])[0]
    assert outcome.special_text.reading == READ_AS_WRITTEN_BY_A_TEMPLATE


def test_answers_that_begin_alike_are_not_cut_inside():
    pair = tokenize_pair(rendered("What is tea?", ASKED, "Good leaf", "Good water"), TOKENIZER)
    assert TOKENIZER.decode(pair.chosen).startswith("Good leaf")
    assert TOKENIZER.decode(pair.prompt).endswith("assistant\n")


def test_a_prompt_column_of_another_conversation():
    row = rendered("Why is the sky blue?", ASKED)
    with pytest.raises(RowProblem, match="is not in the text that both completions begin with"):
        tokenize_pair(row, TOKENIZER)


def test_a_conversation_without_its_answer():
    asked = text(ASKED, add_generation_prompt=True)
    row = PreferenceRow("What is tea?", f"{asked}Good.", asked)
    with pytest.raises(RowProblem, match="column 'rejected' has an empty answer behind"):
        tokenize_pair(row, TOKENIZER)


@pytest.mark.parametrize(
    "completion", ["<|im_end|> is a token", "see <|im_start|>assistant\n"], ids=["begins", "within"]
)
def test_words_about_tokens_stay_words(completion):
    row = PreferenceRow("What is it?", f"{completion} a", f"{completion} b")
    outcome = RowTokenizer(TOKENIZER).rows([row])[0]
    assert outcome.special_text.reading == KEPT_AS_TEXT


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% if %}",
        "{{ messages[0]['content'] }}{{ 'y' if add_generation_prompt else 'no' }}",
    ],
    ids=["none", "raises", "loops", "no-opening", "no-jinja", "no-prefix"],
)
def test_without_a_template_that_opens_an_answer_nothing_is_parted(template, monkeypatch):
    monkeypatch.setattr("lite_orpo.data.tokens.template_limits.MAX_SECONDS", 0.2)
    tokenizer = char_tokenizer(template=template)
    assert generation_prompt(tokenizer) == ""
    outcome = RowTokenizer(tokenizer).rows([rendered("What is tea?", ASKED)])[0]
    assert outcome.special_text.reading == KEPT_AS_TEXT
