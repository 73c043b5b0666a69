"""Answers: the same in any batch, ended where they end, and smaller batches where memory is out."""

import numpy
import pytest
import torch
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data.formats.rows import parse_row
from lite_orpo.data.tokens.tokenization import tokenize_pair
from lite_orpo.errors import DataError, OutOfMemory
from lite_orpo.generation.answering import Answerer, BatchSize, Question, answers_in_batches
from lite_orpo.generation.end_tokens import end_token_ids
from lite_orpo.generation.prompts import prompt_of
from lite_orpo.generation.sampling import GumbelNoise
from lite_orpo.report.samples import Sample, answer

TEXTS = [
    "My kettle is noisy.",
    "I noticed that my workshop is cold in winter. What would you do about that?",
    "Why?",
    "How do I deal with a dull sound? I mean my guitar.",
    "My bike squeaks and nobody knows why.",
]


def prompt(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return prompt_of(tokenizer, messages, positions=None, room=0).token_ids


def questions(tokenizer, **options):
    return [
        Question(prompt(tokenizer, text), 24, seed=number, **options)
        for number, text in enumerate(TEXTS)
    ]


def answers(model, tokenizer, asked, size):
    batch_size = BatchSize(size)
    found = {}
    for numbers, texts in answers_in_batches(Answerer(model, tokenizer), asked, batch_size):
        found.update(zip(numbers, texts, strict=True))
    return [found[number] for number in range(len(asked))], batch_size.size


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "drawn"])
def test_a_batch_answers_as_each_alone(model, tokenizer, temperature):
    asked = questions(tokenizer, temperature=temperature)
    alone = [answers(model, tokenizer, [question], 1)[0][0] for question in asked]
    assert answers(model, tokenizer, asked, 5)[0] == alone
    assert answers(model, tokenizer, asked, 2)[0] == alone
    assert len(set(alone)) > 2


def test_greedy_answers_are_the_models_likeliest_tokens(model, tokenizer):
    question = questions(tokenizer)[1]
    found = Answerer(model, tokenizer).token_ids([question])[0]
    whole = torch.tensor([question.token_ids + found])
    with torch.no_grad():
        logits = model(whole).logits[0]
    start = len(question.token_ids) - 1
    assert logits[start : start + len(found)].argmax(-1).tolist() == found


def test_drawing_touches_no_generator_of_the_process_and_goes_by_its_seed(model, tokenizer):
    asked = questions(tokenizer, temperature=1.0)
    before = torch.random.get_rng_state(), numpy.random.get_state()[1].copy()
    first = answers(model, tokenizer, asked, 5)[0]
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == numpy.random.get_state()[1]).all()
    assert answers(model, tokenizer, asked, 5)[0] == first
    others = [question._replace(seed=question.seed + 100) for question in asked]
    assert answers(model, tokenizer, others, 5)[0] != first


def test_noise_draws_from_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    noise = GumbelNoise([7], [0.7])
    scores = logits.repeat(1, 1)
    draws = torch.stack([noise(torch.zeros(1, 1), scores).argmax() for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.025)
    assert torch.equal(GumbelNoise([7], [0.0])(torch.zeros(1, 1), scores), scores)


def test_the_models_own_sampling_settings_change_nothing(model, tokenizer, monkeypatch):
    asked = questions(tokenizer)
    plain = answers(model, tokenizer, asked, 5)[0]
    for name, value in (("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1)):
        monkeypatch.setattr(model.generation_config, name, value)
    assert answers(model, tokenizer, asked, 5)[0] == plain


def test_the_end_of_a_turn_is_found_in_template_tokenizer_and_model(model):
    chatml = char_tokenizer(template=CHATML)
    model_says = type("M", (), {"generation_config": type("G", (), {"eos_token_id": [7, 9]})})
    ends = end_token_ids(model_says, chatml)
    assert ends == [
        chatml.convert_tokens_to_ids("</s>"),
        7,
        9,
        chatml.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert end_token_ids(object(), char_tokenizer()) == [chatml.convert_tokens_to_ids("</s>")]


def test_an_answer_ends_before_its_end_token(model, tokenizer):
    question = Question(prompt(tokenizer, TEXTS[0]), 100)
    found = Answerer(model, tokenizer).token_ids([question])[0]
    assert 0 < len(found) < 100 and tokenizer.eos_token_id not in found


def out_of_memory_above(model, rows):
    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_the_batch_is_halved_for_good_where_memory_runs_out(model, tokenizer):
    asked = questions(tokenizer)
    expected = answers(model, tokenizer, asked, 1)[0]
    hook = out_of_memory_above(model, 2)
    try:
        assert answers(model, tokenizer, asked, 5) == (expected, 2)
    finally:
        hook.remove()


def test_one_prompt_that_does_not_fit_is_told_in_one_line(model, tokenizer):
    hook = out_of_memory_above(model, 0)
    try:
        with pytest.raises(OutOfMemory, match="memory ran out over one prompt of"):
            answers(model, tokenizer, questions(tokenizer), 4)
    finally:
        hook.remove()


def test_no_row_runs_past_the_positions_on_behalf_of_another(model, tokenizer, monkeypatch):
    # Nothing ends these answers: the padding token is never the likeliest.
    monkeypatch.setattr("lite_orpo.generation.answering.end_token_ids", lambda *_: [0])
    long = prompt(tokenizer, "word " * 100)
    short = prompt(tokenizer, "Why?")
    room = 256 - len(long)
    asked = [Question(long, room + 40), Question(short, room + 40)]
    longest = []

    def watch(module, args, kwargs):
        longest.append(int(kwargs["position_ids"].max()))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        answers(model, tokenizer, asked, 2)
    finally:
        hook.remove()
    assert 250 < max(longest) < 256


def test_a_prompt_is_token_for_token_what_training_makes_of_it(tokenizer):
    messages = [{"role": "user", "content": "What does <|end|> mean?"}]
    row = {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": "It ends a turn."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    expected = tokenize_pair(parse_row(row), tokenizer).prompt
    assert prompt_of(tokenizer, messages, positions=None, room=0).token_ids == expected


def test_oldest_turns_are_left_out_and_the_system_message_stays(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}]
    for turn in range(6):
        messages.append({"role": "user", "content": f"Question {turn} about my garden."})
        messages.append({"role": "assistant", "content": f"Answer {turn}, at some length."})
    messages.append({"role": "user", "content": "And now?"})
    whole = prompt_of(tokenizer, messages, positions=None, room=0)
    found = prompt_of(tokenizer, messages, positions=len(whole.token_ids) - 1, room=20)
    text = tokenizer.decode(found.token_ids)
    assert found.dropped_turns >= 1 and "Be kind." in text and "And now?" in text
    assert "Question 0" not in text and "Question 5" in text
    assert len(found.token_ids) + 20 <= len(whole.token_ids) - 1
    with pytest.raises(DataError, match="do not fit into the model's 10 positions"):
        prompt_of(tokenizer, messages, positions=10, room=1)


def test_samples_of_a_report_leave_the_model_in_training_mode(model, tokenizer):
    samples = [Sample(text, prompt(tokenizer, text)) for text in TEXTS[:2]]
    model.train()
    try:
        found = answer(model, tokenizer, samples, 8)
        assert model.training and all(found) and len(found) == 2
    finally:
        model.eval()
