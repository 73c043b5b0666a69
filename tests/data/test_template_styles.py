"""Eight chat template styles: each gives its goldens, and what holds in them for any text."""

import copy

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from template_goldens import GOLDENS, SYSTEM, WITH_WORDS, assistant, row_with_words, user
from template_styles import (
    LATE_SYSTEM,
    NO_SYSTEM,
    REWRITTEN_THOUGHTS,
    STRIPPED_THOUGHTS,
    STYLES,
    shown,
    styled_tokenizer,
)

from lite_orpo.data.formats.rows import PreferenceRow
from lite_orpo.data.padded_rows import padded_row_batch
from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.tokens.chat_template import COMPLETION_WORDS, SYSTEM_MESSAGE
from lite_orpo.data.tokens.tokenization import (
    KEPT_AS_TEXT,
    RowTokenizer,
    TokenizedPair,
    tokenize_pair,
)
from lite_orpo.errors import RowProblem


@pytest.fixture(params=["right", "left"])
def padding_side(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["own_pad", "pad_is_eos"])
def pad_is_eos(request):
    return request.param


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture
def tokenizer(style, pad_is_eos, padding_side):
    return styled_tokenizer(style.name, pad_is_eos=pad_is_eos, padding_side=padding_side)


def shown_pair(tokenizer, pair):
    return tuple(shown(tokenizer, ids) for ids in pair)


@pytest.mark.parametrize("conversation", GOLDENS)
def test_each_style_gives_its_golden_whatever_the_padding(style, tokenizer, conversation):
    row, goldens = GOLDENS[conversation]
    if style.name not in goldens:
        assert not style.allows_system
        with pytest.raises(RowProblem, match="refused by the chat template: there is no system"):
            tokenize_pair(row, tokenizer)
        return
    assert shown_pair(tokenizer, tokenize_pair(row, tokenizer)) == goldens[style.name]


def test_an_eos_as_somebodys_words_is_spelled_out_in_each_style(style, tokenizer):
    (outcome,) = RowTokenizer(tokenizer).rows([row_with_words(style.eos)])
    assert shown_pair(tokenizer, outcome.pair) == WITH_WORDS[style.name]
    assert outcome.special_text == (style.eos, KEPT_AS_TEXT)


def test_one_bos_begins_a_prompt_and_one_eos_ends_each_completion(style, tokenizer):
    row, _ = GOLDENS["asked"]
    prompt, chosen, rejected = tokenize_pair(row, tokenizer)
    if style.bos is None:
        assert tokenizer.bos_token_id is None
    else:
        assert [i for i, id in enumerate(prompt) if id == tokenizer.bos_token_id] == [0]
    for completion in (chosen, rejected):
        eos = tokenizer.eos_token_id
        assert [i for i, id in enumerate(completion) if id == eos] == [len(completion) - 1]


def test_a_completion_is_what_the_template_writes_behind_the_prompt(style, tokenizer):
    """Tokenised as one text, as a chat program does it, the sequence begins with the same ids."""
    row, _ = GOLDENS["asked"]
    prompt, chosen, _ = tokenize_pair(row, tokenizer)
    whole = tokenizer.apply_chat_template(row.prompt + row.chosen, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[0] != prompt[0]:
        ids = [tokenizer.bos_token_id, *ids]  # the template leaves the BOS to the tokenizer
    end = len(prompt) + len(chosen) - 1
    assert (prompt + chosen)[:end] == ids[:end]


def test_the_scored_labels_of_a_padded_batch_decode_to_the_answers(style, tokenizer):
    short, _ = GOLDENS["asked"]
    long = PreferenceRow([user("hi")], [assistant("yes, with pleasure")], [assistant("no, never")])
    pairs = [PlannedPair(*tokenize_pair(row, tokenizer), is_scored=True) for row in (short, long)]
    batch = padded_row_batch(pairs, tokenizer.pad_token_id, nll_on_prompt=False)
    answers = ["yes", "no", "yes, with pleasure", "no, never"]
    for number, answer in enumerate(answers):
        labels = batch.targets[batch.completion_ids == number].tolist()
        # Padding that looks like an EOS is not learnt: each completion has its own, once.
        assert labels.count(tokenizer.eos_token_id) == 1
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labels, skip_special_tokens=True).strip() == answer
    assert batch.inputs["attention_mask"].sum() == batch.tokens


def outcome_with(template, prompt, chosen, rejected):
    tokenizer = copy.deepcopy(styled_tokenizer("chatml"))
    tokenizer.chat_template = template
    row = PreferenceRow(prompt, [assistant(chosen)], [assistant(rejected)])
    return RowTokenizer(tokenizer).rows([row])[0], tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        [SYSTEM, user("hi")],
        [SYSTEM, user("be kind")],
        [SYSTEM, user("be quick")],
        [SYSTEM, user("hi"), assistant("you"), user("sure?")],
    ],
)
def test_a_system_message_that_is_only_before_the_last_users_turn_is_refused(prompt):
    problem, _ = outcome_with(LATE_SYSTEM, prompt, "yes", "no")
    assert isinstance(problem, RowProblem)
    assert problem.column == "prompt"
    assert "messages of it then stand elsewhere or nowhere" in problem.problem


def test_the_same_template_without_a_system_message_is_fine():
    outcome, tokenizer = outcome_with(LATE_SYSTEM, [user("hi")], "yes", "no")
    assert shown_pair(tokenizer, outcome.pair) == (
        "[INST]Ġhi[/INST]",
        "Ġyes«<|im_end|>»",
        "Ġno«<|im_end|>»",
    )
    assert outcome.unwritten == frozenset()


@pytest.mark.parametrize("name", STYLES)
def test_what_a_style_writes_is_not_told_to_be_left_out(name):
    tokenizer = styled_tokenizer(name)
    rows = [row for row, goldens in GOLDENS.values() if name in goldens]
    for outcome in RowTokenizer(tokenizer).rows(rows):
        assert outcome.unwritten == frozenset()


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_that_the_template_does_not_write_is_told(role):
    template = NO_SYSTEM.replace("m['role'] != 'system'", f"m['role'] != '{role}'")
    prompt = [{"role": role, "content": "be kind"}, user("hi")]
    outcome, _ = outcome_with(template, prompt, "yes", "no")
    assert outcome.unwritten == {SYSTEM_MESSAGE}
    outcome, _ = outcome_with(template, [user("hi")], "yes", "no")
    assert outcome.unwritten == frozenset()


@pytest.mark.parametrize(
    ("template", "chosen", "unwritten"),
    [
        (STRIPPED_THOUGHTS, "<think>\nwell\n</think>yes", {COMPLETION_WORDS}),
        (STRIPPED_THOUGHTS, "yes", set()),
        (REWRITTEN_THOUGHTS, "<think>well</think>yes", set()),
        (REWRITTEN_THOUGHTS, "so <think>well</think>yes", {COMPLETION_WORDS}),
        (REWRITTEN_THOUGHTS, "yes", set()),
    ],
)
def test_words_of_an_answer_that_the_template_leaves_out_are_told(template, chosen, unwritten):
    outcome, _ = outcome_with(template, [user("hi")], chosen, "no")
    assert outcome.unwritten == unwritten


def test_answers_that_differ_in_stripped_thoughts_alone_are_refused():
    thoughts = [f"<think>{thought}</think>yes" for thought in ("well", "bad")]
    problem, _ = outcome_with(STRIPPED_THOUGHTS, [user("hi")], *thoughts)
    assert isinstance(problem, RowProblem)
    assert "identical to column 'chosen' once tokenised" in problem.problem


def controls(tokenizer, pair):
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    return [[id for id in ids if id in special] for ids in pair]


def texts_with_special_tokens(style):
    known = [token for token in (style.bos, style.eos, *style.others) if token]
    pieces = st.one_of(
        st.sampled_from(
            [*known, *(token[1:] for token in known), *(token[:-1] for token in known)]
        ),
        st.sampled_from(["<", ">", "|", " ", "\n", "  ", "\n\n", "\ue000", "\ue001"]),
        st.text(st.characters(codec="utf-8"), max_size=8),
    )
    words = st.lists(pieces, max_size=6).map("".join)
    # A letter at each end: what a template trims is its business, not in question here.
    return words.map(lambda text: f"a{text}b")


@pytest.mark.parametrize("name", STYLES)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_text_adds_a_control_token_or_takes_one_away(name, data):
    tokenizer = styled_tokenizer(name)
    texts = texts_with_special_tokens(STYLES[name])
    asked, good, bad = data.draw(texts), data.draw(texts), data.draw(texts)
    assume(good != bad)
    pair = tokenize_pair(
        PreferenceRow([user(asked)], [assistant(good)], [assistant(bad)]), tokenizer
    )
    harmless, _ = GOLDENS["asked"]
    assert controls(tokenizer, pair) == controls(tokenizer, tokenize_pair(harmless, tokenizer))
    for completion, text in ((pair.chosen, good), (pair.rejected, bad)):
        words = [id for id in completion if id not in tokenizer.added_tokens_decoder]
        assert tokenizer.decode(words).strip() == text
    spoken = [id for id in pair.prompt if id not in tokenizer.added_tokens_decoder]
    assert asked in tokenizer.decode(spoken)


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_plain_texts_come_back_whole_between_one_bos_and_one_eos(name, data):
    tokenizer = styled_tokenizer(name)
    texts = texts_with_special_tokens(STYLES[name])
    row = PreferenceRow(data.draw(texts), data.draw(texts), data.draw(texts))
    assume(row.chosen != row.rejected)
    pair = tokenize_pair(row, tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [tokenizer.eos_token_id]
    assert controls(tokenizer, pair) == [bos, eos, eos]
    read = TokenizedPair(pair.prompt[len(bos) :], pair.chosen[:-1], pair.rejected[:-1])
    begun = " " if STYLES[name].core == "metaspace" else ""
    assert tokenizer.decode(read.prompt) == begun + row.prompt
    assert [tokenizer.decode(ids) for ids in read[1:]] == [row.chosen, row.rejected]
