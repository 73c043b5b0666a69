"""`lite-orpo chat` with its input from a pipe: answers, commands, comparing, and mistakes."""

import shutil
from pathlib import Path

import pytest

from lite_orpo.generation.answering import Answerer

ROOT = Path(__file__).parents[2]
SHORT = ("--temperature", "0", "--max-new-tokens", "12")


def test_a_conversation_from_a_pipe_ends_with_its_input(demo_run, command):
    code, said, error = command("chat", demo_run, *SHORT, stdin="My kettle is noisy.\n\nWhy?\n")
    assert code == 0, error
    assert said.count("you> ") == 2
    answers = [part.split("\n")[1] for part in said.split("you> ")[1:]]
    assert all(len(answer.split()) > 3 for answer in answers)


def test_quit_ends_and_reset_forgets(demo_run, command):
    text = "My kettle is noisy.\nMy kettle is noisy.\n/reset\nMy kettle is noisy.\n/quit\nHi\n"
    code, said, error = command("chat", demo_run, "--max-new-tokens", "20", stdin=text)
    assert code == 0, error
    answers = [part.split("\n")[1] for part in said.split("you> My kettle is noisy.")[1:]]
    assert answers[0] == answers[2] != answers[1]
    assert "you> Hi" not in said


def panels(said):
    """The texts of both panels of each answer, their lines joined."""
    found = []
    for part in said.split("you> ")[1:]:
        cells = [line.split("│") for line in part.splitlines() if line.startswith("│")]
        both = [(cell[1], cell[3]) if len(cell) > 3 else (cell[1], "") for cell in cells]
        found.append(tuple(" ".join(" ".join(lines).split()) for lines in zip(*both, strict=True)))
    return found


def test_compare_shows_both_and_each_has_its_own_history(demo_run, command):
    text = "My kettle is noisy.\nAnd my bike squeaks.\nWhy?\n"
    drawn = ("--temperature", "0.8", "--max-new-tokens", "20")
    code, said, error = command("chat", demo_run, "--compare", *drawn, stdin=text)
    assert code == 0, error
    assert said.count("base (adapter off)") == said.count("─ adapter ─") == 3
    for side, target in enumerate(("examples/demo_model", demo_run)):
        code, alone, _ = command("chat", target, *drawn, stdin=text)
        answers = [" ".join(part.split("\n")[1].split()) for part in alone.split("you> ")[1:]]
        assert [both[side] for both in panels(said)] == answers


def test_a_system_message_begins_anew_and_changes_the_answer(demo_run, command):
    text = "My kettle is noisy.\n/system Speak of the sea and of nothing else.\nMy kettle is noisy."
    code, said, error = command("chat", demo_run, *SHORT, stdin=text)
    assert code == 0 and "system: Speak of the sea" in said, error
    answers = [part.split("\n")[1] for part in said.split("you> My kettle is noisy.")[1:]]
    assert answers[0] != answers[1]


def test_a_long_conversation_drops_its_oldest_turns_and_says_so_once(demo_run, command):
    text = "I have a question about my garden and what grows in it at this time of the year.\n" * 9
    code, said, error = command("chat", demo_run, *SHORT, stdin=text)
    assert code == 0, error
    assert said.count("its oldest turns") == 1 and said.count("you> ") == 9


def test_a_message_that_never_fits_is_told_and_the_conversation_goes_on(demo_run, command):
    code, said, error = command("chat", demo_run, *SHORT, stdin="word " * 400 + "\nHi\n")
    assert code == 0, error
    assert "do not fit into" in " ".join(said.split()) and said.rstrip().count("you> Hi") == 1


def test_without_a_chat_template_the_prompt_is_plain_and_this_is_said_once(command, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(ROOT / "examples/demo_model", folder)
    (folder / "chat_template.jinja").unlink()
    code, said, error = command("chat", folder, *SHORT, stdin="My kettle\nis noisy\n")
    assert code == 0, error
    assert said.count("no chat template") == 1 and said.count("you> ") == 2


def test_ctrl_c_ends_the_answer_and_not_the_program(demo_run, command, monkeypatch):
    answer = Answerer.token_ids
    calls = []

    def interrupted_at_the_third_word(self, questions, streamer=None):
        put = streamer.put

        def put_until(value):
            put(value)
            if len(calls) == 1 and streamer.text.count(" ") > 2:
                raise KeyboardInterrupt

        calls.append(streamer)
        streamer.put = put_until
        return answer(self, questions, streamer)

    monkeypatch.setattr(Answerer, "token_ids", interrupted_at_the_third_word)
    code, said, error = command("chat", demo_run, *SHORT, stdin="My kettle is noisy.\nWhy?\n")
    assert code == 0, error
    assert said.count("(stopped)") == 1 and len(calls) == 2
    assert len(said.split("you> Why?")[1].split()) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "TARGET not given"),
        (["examples/demo_model", "--compare"], "has no adapter to switch off"),
        (["examples/demo_model", "--temperature", "-1"], "--temperature must be at least 0"),
        (["examples/demo_model", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["examples/demo_data"], "holds no adapter and no model"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(command, words, message):
    code, _, error = command("chat", *words, stdin="Hi\n")
    assert code == 2 and message in error and len(error.splitlines()) == 1, error


def test_a_base_in_4_bits_answers_on_a_cpu(demo_run, command):
    code, said, error = command("chat", demo_run, "load_in_4bit=true", *SHORT, stdin="Hi there.\n")
    assert code == 0, error
    assert len(said.split("you> Hi there.")[1].split()) > 3


def test_a_setting_that_the_model_lacks_is_one_line_without_a_wrong_trail(demo_run, command):
    code, _, error = command("chat", demo_run, "attn_implementation=nonsense", stdin="Hi\n")
    assert code == 2 and "nonsense" in error and "--base" not in error
    assert len(error.splitlines()) == 1
