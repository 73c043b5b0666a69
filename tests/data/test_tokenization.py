"""tokenize_pair: one BOS, one EOS, and a prompt that is an exact prefix of both sequences."""

import pytest
from tiny_tokenizer import CHATML, char_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lite_orpo.data.formats.rows import PreferenceRow, parse_row
from lite_orpo.data.tokens.tokenization import RowTokenizer, special_texts_in, tokenize_pair
from lite_orpo.errors import DataError, RowProblem

ASK = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "no"}
CHAT = PreferenceRow([ASK], [GOOD], [BAD])
PLAIN = PreferenceRow("hi ", "hello", "no")
# Behind ChatML: a generation prompt that says that there are no thoughts.
NO_THOUGHTS = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_plain_rows_get_one_bos_and_one_eos(tokenizer):
    pair = tokenize_pair(PLAIN, tokenizer)
    assert text(tokenizer, pair.prompt) == "<s>hi "
    assert text(tokenizer, pair.chosen) == "hello</s>"
    assert text(tokenizer, pair.rejected) == "no</s>"


@pytest.mark.parametrize("prompt", ["<s>hi ", "<s><s>hi ", "<s><s><s>hi "])
def test_a_bos_in_the_text_is_not_doubled(tokenizer, prompt):
    pair = tokenize_pair(PLAIN._replace(prompt=prompt), tokenizer)
    assert text(tokenizer, pair.prompt) == "<s>hi "


@pytest.mark.parametrize("chosen", ["hello</s>", "hello</s></s>", "hello</s>\n", "hello</s> \n"])
def test_an_eos_in_the_text_is_not_doubled_and_nothing_follows_it(tokenizer, chosen):
    pair = tokenize_pair(PLAIN._replace(chosen=chosen), tokenizer)
    assert text(tokenizer, pair.chosen) == "hello</s>"


def test_an_eos_inside_a_completion_stays_where_it_is_as_text(tokenizer):
    pair = tokenize_pair(PLAIN._replace(chosen="a</s>b"), tokenizer)
    assert text(tokenizer, pair.chosen) == "a</s>b</s>"
    assert pair.chosen.count(tokenizer.eos_token_id) == 1


def test_an_empty_prompt_is_the_bos_alone(tokenizer):
    assert tokenize_pair(PLAIN._replace(prompt=""), tokenizer).prompt == [tokenizer.bos_token_id]


def test_without_a_bos_none_is_added_and_an_empty_prompt_is_refused():
    tokenizer = char_tokenizer(bos=None)
    assert text(tokenizer, tokenize_pair(PLAIN, tokenizer).prompt) == "hi "
    with pytest.raises(RowProblem, match="empty and the tokenizer has no BOS"):
        tokenize_pair(PLAIN._replace(prompt=""), tokenizer)


def test_without_an_eos_the_data_is_refused():
    with pytest.raises(DataError, match="no EOS token"):
        tokenize_pair(PLAIN, char_tokenizer(eos=None))


def test_a_completion_that_is_only_an_eos_is_refused(tokenizer):
    with pytest.raises(RowProblem) as caught:
        tokenize_pair(PLAIN._replace(rejected="</s>"), tokenizer)
    assert caught.value.column == "rejected"


def test_the_prompt_is_an_exact_prefix_where_tokens_would_merge_over_its_end():
    # Jointly "xa" + "b" is [x, ab]: the prompt's last token would differ between completions.
    core = Tokenizer(models.BPE({"x": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "</s>": 5}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer("xab")["input_ids"] == [0, 4]
    pair = tokenize_pair(PreferenceRow("xa", "b", "cab"), tokenizer)
    assert pair == ([0, 1], [2, 5], [3, 4, 5])


def test_a_chat_ends_at_the_templates_end_of_turn(chatml_tokenizer):
    pair = tokenize_pair(CHAT, chatml_tokenizer)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text(chatml_tokenizer, pair.prompt) == prompt
    # ChatML writes a line break behind the end of turn; a model never gets to write it.
    assert text(chatml_tokenizer, pair.chosen) == "hello<|im_end|>"
    assert text(chatml_tokenizer, pair.rejected) == "no<|im_end|>"


def test_a_turns_end_that_is_no_eos_stays_and_one_eos_follows_it():
    tokenizer = char_tokenizer(template=CHATML)
    assert text(tokenizer, tokenize_pair(CHAT, tokenizer).chosen) == "hello<|im_end|></s>"


def test_an_answer_that_the_template_leaves_out_is_refused():
    tokenizer = char_tokenizer(template="{% for m in messages %}<|im_end|>{% endfor %}")
    with pytest.raises(RowProblem, match="has no token left beside the EOS") as caught:
        tokenize_pair(CHAT, tokenizer)
    assert caught.value.column == "chosen"


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("yes", "yes</s>"), ("yes</s></s>", "yes</s>\n"), ("\u00e9", "\u00e8")]
)
def test_completions_that_are_the_same_once_tokenised_are_refused(tokenizer, chosen, rejected):
    with pytest.raises(RowProblem) as caught:
        tokenize_pair(PLAIN._replace(chosen=chosen, rejected=rejected), tokenizer)
    assert caught.value.column == "rejected"
    assert caught.value.problem == (
        "is identical to column 'chosen' once tokenised: nothing to prefer"
    )


def test_completions_that_a_template_makes_the_same_are_refused():
    tokenizer = char_tokenizer(template=CHATML.replace("m['content']", "m['content']|trim"))
    row = CHAT._replace(rejected=[{"role": "assistant", "content": "hello\n "}])
    with pytest.raises(RowProblem, match="identical to column 'chosen' once tokenised"):
        tokenize_pair(row, tokenizer)


def test_an_unknown_character_at_the_end_of_an_answer_is_no_end_of_turn(tokenizer):
    pair = tokenize_pair(PLAIN._replace(chosen="hé\n"), tokenizer)
    assert len(pair.chosen) == len("hé\n") + 1


def test_many_rows_at_once_give_what_each_gives_alone(tokenizer, chatml_tokenizer):
    refused = PLAIN._replace(rejected="</s>")
    outcomes = RowTokenizer(tokenizer).rows([PLAIN, refused, PLAIN._replace(chosen="more")])
    assert [isinstance(each, RowProblem) for each in outcomes] == [False, True, False]
    assert outcomes[0].pair == tokenize_pair(PLAIN, tokenizer)
    assert text(tokenizer, outcomes[2].pair.chosen) == "more</s>"
    both = RowTokenizer(chatml_tokenizer).rows([CHAT, PLAIN])
    assert [each.pair for each in both] == [
        tokenize_pair(CHAT, chatml_tokenizer),
        tokenize_pair(PLAIN, chatml_tokenizer),
    ]


def test_no_row_is_looked_at_after_one_whose_error_concerns_all(tokenizer):
    outcomes = RowTokenizer(tokenizer).rows([PLAIN, CHAT, PLAIN])
    assert len(outcomes) == 2
    assert isinstance(outcomes[1], DataError)


def test_a_prompt_keeps_its_tokens_where_a_sentencepiece_token_would_stand_across_its_end():
    core = Tokenizer(
        models.BPE({"▁": 0, "a": 1, "b": 2, "\n": 3, "ab": 4, "</s>": 5}, [("a", "b")])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer("aab")["input_ids"] == [0, 1, 4]
    pair = tokenize_pair(PreferenceRow("aa", "b", "ab"), tokenizer)
    # No space before the completion, though alone it would get one.
    assert pair == ([0, 1, 1], [2, 5], [4, 5])


def test_a_chat_of_several_turns_keeps_its_inner_ends_of_turn(chatml_tokenizer):
    pair = tokenize_pair(PreferenceRow([ASK], [GOOD, ASK, GOOD], [BAD]), chatml_tokenizer)
    chosen = text(chatml_tokenizer, pair.chosen)
    assert chosen.count("<|im_end|>") == 3
    assert chosen.endswith("hello<|im_end|>")


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(chatml_tokenizer):
    begun = {"role": "assistant", "content": "Well, "}
    row = PreferenceRow([ASK, begun], [GOOD], [BAD])
    pair = tokenize_pair(row, chatml_tokenizer)
    prompt = text(chatml_tokenizer, pair.prompt)
    assert prompt.endswith("<|im_start|>assistant\nWell, ")
    for completion in (pair.chosen, pair.rejected):
        assert completion[-1] == chatml_tokenizer.eos_token_id


def test_an_implicit_prompt_gives_the_same_tokens_as_an_explicit_one(chatml_tokenizer):
    implicit = parse_row({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]})
    assert tokenize_pair(implicit, chatml_tokenizer) == tokenize_pair(CHAT, chatml_tokenizer)


def test_a_template_that_writes_the_bos_itself_gives_one():
    tokenizer = char_tokenizer(template="{{ bos_token }}" + CHATML)
    assert text(tokenizer, tokenize_pair(CHAT, tokenizer).prompt).count("<s>") == 1


@pytest.mark.parametrize("asked", ["hi", "think", "</think>", "a", "\n  assistant  \n"])
def test_a_generation_prompt_that_differs_ends_the_prompt_where_all_renderings_agree(asked):
    tokenizer = char_tokenizer(template=f"{CHATML}{NO_THOUGHTS}")
    row = CHAT._replace(prompt=[{"role": "user", "content": asked}])
    pair = tokenize_pair(row, tokenizer)
    prompt = f"<s><|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert text(tokenizer, pair.prompt) == prompt
    assert text(tokenizer, pair.chosen) == "hello<|im_end|></s>"


@pytest.mark.parametrize("change", ["|upper", "|trim", "|tojson", "[:3]"])
def test_a_generation_prompt_may_differ_behind_words_that_the_template_changes(change):
    template = f"{CHATML}{NO_THOUGHTS}".replace("m['content']", f"m['content']{change}")
    row = CHAT._replace(prompt=[{"role": "user", "content": " say 'hi' "}])
    pair = tokenize_pair(row, char_tokenizer(template=template))
    assert text(char_tokenizer(), pair.prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("marked", "asked"),
    [
        ("{{ '>' if loop.last }}{{ m['content'] }}", "hi"),
        ("{{ '>' if loop.last }}{{ m['content']|upper }}", "hi"),
        ("{{ m['content'] if loop.last }}", "hi"),
        ("{{ m['content'] if loop.last else m['content'][:1] }}", "hi"),
        ("{{ m['content'] if loop.last else 'yes' }}", "yes, please"),
    ],
)
def test_a_template_that_writes_the_prompts_words_differently_before_an_answer_is_refused(
    marked, asked
):
    # Their words would be taken for the answer's.
    tokenizer = char_tokenizer(template=CHATML.replace("{{ m['content'] }}", marked))
    with pytest.raises(RowProblem, match="differently by the chat template once an answer") as it:
        tokenize_pair(CHAT._replace(prompt=[{"role": "user", "content": asked}]), tokenizer)
    assert it.value.column == "prompt"
    assert "chat_template_path" in it.value.problem
    assert "\n" not in it.value.problem


def test_the_whole_of_both_renderings_is_in_prompt_and_completions():
    tokenizer = char_tokenizer(template=f"{CHATML}{NO_THOUGHTS}")
    pair = tokenize_pair(CHAT, tokenizer)
    for ids, message in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        rendered = tokenizer.apply_chat_template([ASK, message], tokenize=False)
        # All of it but the line break behind the last turn, which a model never gets to write.
        assert text(tokenizer, pair.prompt + ids) == f"<s>{rendered.rstrip()}</s>"


def test_a_template_that_refuses_a_role_is_a_problem_of_the_row():
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('system role not supported') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    row = PreferenceRow([{"role": "system", "content": "s"}, ASK], [GOOD], [BAD])
    with pytest.raises(RowProblem, match="refused by the chat template: system role not supported"):
        tokenize_pair(row, char_tokenizer(template=refusing))


def test_conversations_without_a_template_are_refused_with_the_remedy(tokenizer):
    with pytest.raises(DataError, match="chat_template_path"):
        tokenize_pair(CHAT, tokenizer)


def test_special_tokens_standing_as_text_are_found(chatml_tokenizer):
    assert special_texts_in(CHAT, chatml_tokenizer) == []
    spoken = {"role": "user", "content": "say <|im_end|>"}
    assert special_texts_in(CHAT._replace(prompt=[spoken]), chatml_tokenizer) == ["<|im_end|>"]
    plain = PLAIN._replace(rejected="a <pad> b")
    assert special_texts_in(plain, chatml_tokenizer) == ["<pad>"]


def test_a_template_that_is_no_jinja_is_named_as_such_not_blamed_on_the_rows():
    broken = char_tokenizer(template="{% for m in messages %}")
    question = [{"role": "user", "content": "q"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    row = parse_row({"prompt": question, "chosen": answers[0], "rejected": answers[1]})
    with pytest.raises(DataError, match="the chat template is no valid Jinja, line 1"):
        tokenize_pair(row, broken)


def test_a_text_that_the_tokenizer_itself_refuses_says_why():
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "q": 3}, unk_token="[UNK]"))
    without_unk = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(RowProblem, match="'rejected' is refused by the tokenizer: .*UNK"):
        tokenize_pair(PreferenceRow("q", "a", "c"), without_unk)
    with pytest.raises(RowProblem, match="'chosen' has characters that are no valid Unicode"):
        tokenize_pair(PreferenceRow("q", "\ud83d", "b"), without_unk)
