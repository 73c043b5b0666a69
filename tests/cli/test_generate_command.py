"""`lite-orpo generate`: the benchmarks' formats, going on after a kill, and mistakes."""

import json

import pytest

from lite_orpo.generation import answering
from lite_orpo.generation.journal import Journal

ALPACA = [
    {"dataset": "koala", "instruction": "My kettle is noisy.", "output": "?", "generator": "x"},
    {"instruction": "My guitar sounds dull. What would you do about that?"},
    {"instruction": "My bike squeaks."},
    {"instruction": "I noticed that my workshop is cold."},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["My kettle is noisy.", "And my bike?"]},
    {"question_id": 82, "category": "math", "turns": ["My bike squeaks.", "Say why."]},
]
LENGTH = ("--max-new-tokens", "10")


@pytest.fixture
def prompts(tmp_path):
    alpaca, mt_bench = tmp_path / "alpaca.json", tmp_path / "question.jsonl"
    alpaca.write_text(json.dumps(ALPACA))
    mt_bench.write_text("\n".join(map(json.dumps, MT_BENCH)))
    return {"alpaca_eval": alpaca, "mt_bench": mt_bench}


@pytest.fixture
def generate(command, demo_run, prompts, tmp_path):
    def call(form, *words, output="out.json"):
        words = (*LENGTH, *words) if "--max-new-tokens" not in words else words
        output = tmp_path / output
        command_words = [demo_run, prompts[form], "--format", form, "-o", output, *words]
        code, _, error = command("generate", *command_words)
        return code, error, output

    return call


def test_alpaca_eval_gets_its_list_in_the_order_of_the_prompts(generate):
    code, error, output = generate("alpaca_eval", "--name", "mine")
    assert code == 0, error
    rows = json.loads(output.read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ALPACA]
    assert [row["dataset"] for row in rows] == ["koala", "alpaca", "alpaca", "alpaca"]
    assert {row["generator"] for row in rows} == {"mine"}
    assert all(list(row) == ["dataset", "instruction", "output", "generator"] for row in rows)
    assert all(row["output"].strip() for row in rows)


def test_mt_bench_gets_its_lines_and_a_second_turn_sees_the_first(
    generate, prompts, demo_run, monkeypatch
):
    asked, texts = [], answering.Answerer.texts

    def noted(self, questions):
        asked.extend(self._tokenizer.decode(question.token_ids) for question in questions)
        return texts(self, questions)

    monkeypatch.setattr(answering.Answerer, "texts", noted)
    code, error, output = generate("mt_bench")
    assert code == 0, error
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    keys = ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert all(list(row) == keys and row["model_id"] == "demo" for row in rows)
    assert rows[0]["choices"][0]["index"] == 0 and len(rows[0]["choices"][0]["turns"]) == 2
    assert rows[0]["answer_id"] != rows[1]["answer_id"]
    for row, item in zip(rows, MT_BENCH, strict=True):
        (second,) = [prompt for prompt in asked if item["turns"][1] in prompt]
        assert item["turns"][0] in second and row["choices"][0]["turns"][0] in second
    # The same second turn, asked first, has another answer.
    prompts["mt_bench"].write_text(json.dumps({**MT_BENCH[1], "turns": ["Say why."]}))
    code, error, alone = generate("mt_bench", output="alone.jsonl")
    assert code == 0, error
    first = json.loads(alone.read_text())["choices"][0]["turns"][0]
    assert first != rows[1]["choices"][0]["turns"][1]


def test_answers_do_not_depend_on_the_batch_size_even_when_drawn(generate):
    words = ("--temperature", "0.9", "--seed", "4")
    outputs = []
    for size in ("1", "3", "8"):
        code, error, output = generate("alpaca_eval", *words, "--batch-size", size, "--overwrite")
        assert code == 0, error
        outputs.append(output.read_text())
    assert outputs[0] == outputs[1] == outputs[2]
    code, error, output = generate("alpaca_eval", "--temperature", "0.9", output="other.json")
    assert code == 0 and output.read_text() != outputs[0]


def test_the_adapter_off_answers_as_the_base_model(generate, command, prompts, tmp_path):
    assert generate("alpaca_eval", "--adapter-off", "--name", "x", output="off.json")[0] == 0
    words = [prompts["alpaca_eval"], "--format", "alpaca_eval", *LENGTH, "--name", "x"]
    code, _, error = command(
        "generate", "examples/demo_model", *words, "-o", tmp_path / "base.json"
    )
    assert code == 0, error
    assert (tmp_path / "off.json").read_text() == (tmp_path / "base.json").read_text()


def test_a_killed_run_goes_on_with_what_is_missing_and_ends_the_same(generate, monkeypatch):
    words = ("--temperature", "0.8", "--batch-size", "1")
    code, error, whole = generate("alpaca_eval", *words, output="whole.json")
    assert code == 0, error
    add, answered = Journal.add, []

    def killed_at_the_third(self, entries):
        entries = list(entries)
        answered.extend(entry.number for entry in entries)
        if len(answered) == 3:
            raise KeyboardInterrupt
        add(self, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_at_the_third)
        code, error, _ = generate("alpaca_eval", *words)
    assert code == 130 and "the same command goes on" in error
    journal = whole.with_name("out.json.partial.jsonl")
    with journal.open("a") as stream:
        stream.write('{"number": 9, "turn": 0, "ans')  # a write that was torn
    asked = []
    texts = answering.Answerer.texts

    def counted(self, questions):
        asked.extend(questions)
        return texts(self, questions)

    monkeypatch.setattr(answering.Answerer, "texts", counted)
    code, error, output = generate("alpaca_eval", *words)
    assert code == 0 and "goes on: 2 answers" in error, error
    assert len(asked) == 2
    assert output.read_text() == whole.read_text().replace("whole", "out")
    assert not journal.exists()


@pytest.mark.parametrize(
    ("word", "name"),
    [("--seed=9", "seed"), ("--temperature=0.5", "temperature"), ("--adapter-off", "adapter")],
)
def test_a_journal_of_another_run_is_refused_in_one_line(generate, monkeypatch, word, name):
    def killed(self, entries):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        assert generate("alpaca_eval")[0] == 130
    code, error, _ = generate("alpaca_eval", word)
    assert code == 2 and f"is of a run that differs in {name};" in error
    assert sum("error" in line for line in error.splitlines()) == 1


def test_other_prompts_are_another_run(generate, monkeypatch, prompts):
    def killed(self, entries):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        assert generate("alpaca_eval")[0] == 130
    prompts["alpaca_eval"].write_text(json.dumps(ALPACA[:3]))
    code, error, _ = generate("alpaca_eval")
    assert code == 2 and "differs in prompts;" in error


BAD_FILES = [
    ("alpaca_eval", "[]", "no prompts in it"),
    ("alpaca_eval", '[{"prompt": "Hi"}]', "instruction must be a text that is not empty"),
    ("alpaca_eval", '[{"instruction": " "}]', "instruction must be a text that is not empty"),
    ("alpaca_eval", "not json", "alpaca.json"),
    ("alpaca_eval", json.dumps([{"instruction": "word " * 400}]), "prompt 1: a prompt of 4"),
    ("mt_bench", '{"category": "math", "turns": ["a"]}', "question_id must be a number or a text"),
    ("mt_bench", '{"question_id": 1, "category": "math", "turns": "a"}', "turns must be a list"),
    ("mt_bench", '{"question_id": 1, "category": "math", "turns": [1]}', "entry that is no text"),
    (
        "mt_bench",
        '{"question_id": 1, "category": "x", "turns": ["a"]}\n' * 2,
        "question_id 1 is that of line 1 too",
    ),
]


@pytest.mark.parametrize(("form", "text", "message"), BAD_FILES, ids=[m for _, _, m in BAD_FILES])
def test_a_prompt_file_that_cannot_be_used_is_one_line(generate, prompts, form, text, message):
    prompts[form].write_text(text)
    code, error, output = generate(form)
    assert code == 2 and message in error, error
    assert sum("lite-orpo: error" in line for line in error.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "alpaca"], "--format must be alpaca_eval or mt_bench"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["more"], "'more' is neither key=value nor TARGET or PROMPTS"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(generate, words, message):
    code, error, _ = generate("alpaca_eval", *words)
    assert code == 2 and message in error, error


def test_an_output_that_exists_is_not_replaced_unasked(generate, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    code, error, output = generate("alpaca_eval")
    assert code == 2 and "exists; name another file, or give --overwrite" in error
    assert output.read_text() == "mine"
