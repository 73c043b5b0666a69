"""`lite-orpo check` from a user's side: exit codes, files, one row's tokens, train's lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lite_orpo.cli.check_target import DEFAULT_MAX_LENGTH, resolve_target
from lite_orpo.cli.main import run
from lite_orpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples/demo_model")
DEMO = str(ROOT / "examples/demo_data/train.jsonl")
GOOD = [
    {"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)
]
# One file for each way to be wrong, the message's beginning behind it; kept here and not as
# files, so that what is wrong can be read.
BAD_FILES = {
    "missing_column": (b'{"prompt": "a", "chosen": "b"}\n', "line 1: column 'rejected' is missing"),
    "capitals": (
        b'{"Prompt": "a", "Chosen": "b", "Rejected": "c"}\n',
        "rename column 'Chosen'",
    ),
    "number": (b'{"prompt": "a", "chosen": 1, "rejected": "c"}\n', "column 'chosen' must be text"),
    "bad_json": (b'{"prompt": \n', "line 1: not valid JSON"),
    "latin1": (b'{"prompt": "caf\xe9"}\n', "line 1: byte 0xe9 is not UTF-8"),
    "empty": (b"", "no rows"),
    "damaged.gz": (b"\x1f\x8b\x08\x00 no gzip", "damaged"),
}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Run the command here; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lite-orpo", "check", *map(str, words)])
        code = 0
        try:
            run()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_good_pairs_exit_0_and_leave_two_files(check, tmp_path):
    code, out, err = check(write(tmp_path / "pairs.jsonl", GOOD))
    assert code == 0, err
    assert "30 pairs" in out and "characters (no --model)" in out
    written = json.loads((tmp_path / "check/check.json").read_text())
    assert written["schema"] == "lite-orpo-check/1"
    assert written["data"]["readable"] == 30 and written["model"] is None
    assert (tmp_path / "check/check.html").read_text().startswith("<!doctype html>")


def test_the_schema_is_the_promised_one(check, tmp_path):
    rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(GOOD * 2)]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert check(path, "--eval", path, "--model", MODEL)[0] == 0
    written = json.loads((tmp_path / "check/check.json").read_text())
    keys = "schema data format model unit lengths overlong pairs rules balance held_out"
    assert set(written) == {*keys.split(), "unreadable_kinds", "findings"}
    assert set(written["lengths"]) == {"prompt", "chosen", "rejected", "sequence"}
    assert set(written["lengths"]["prompt"]) == {"mean", "median", "p95", "longest", "histogram"}
    assert set(written["rules"]) == {"length", "first_token", "first_tokens"}
    assert set(written["findings"][0]) == {
        *("id", "severity", "title", "rows", "places", "harm", "advice")
    }
    assert written["model"] == "demo_model" and written["unit"] == "tokens"
    assert written["held_out"]["shared_prompts"] == 60
    assert [c["rows"] for c in written["balance"]["categories"]] == [30, 30]


def test_the_files_name_no_folder_of_the_machine(check, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD[0]) + "\n{broken\n")
    assert check(tmp_path / "pairs.jsonl", "--model", MODEL)[0] == 0
    for name in ("check.html", "check.json"):
        text = (tmp_path / "check" / name).read_text()
        assert "pairs.jsonl" in text
        assert str(tmp_path) not in text and str(ROOT) not in text


@pytest.mark.parametrize("name", ["shards", "{folder}/shards", "."])
def test_the_files_name_no_folder_that_holds_shards(check, tmp_path, monkeypatch, name):
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "test"):
        for i in range(2):
            write(folder / f"{split}-0000{i}-of-00002.jsonl", GOOD[:5])
        with (folder / f"{split}-00001-of-00002.jsonl").open("a") as stream:
            stream.write("{broken\n")
    if name == ".":
        monkeypatch.chdir(folder)
    code, _, err = check(name.format(folder=tmp_path), "-o", tmp_path / "check")
    assert code == 0, err
    for file in ("check.html", "check.json"):
        text = (tmp_path / "check" / file).read_text()
        assert "shards [train]" in text and "shards [test]" in text
        assert "train-00001-of-00002.jsonl line 6: not valid JSON" in text
        assert str(tmp_path) not in text


def test_strict_exits_1_for_serious_findings_only(check, tmp_path):
    good = write(tmp_path / "good.jsonl", GOOD)
    other = write(tmp_path / "other.jsonl", [{**row, "prompt": "new"} for row in GOOD])
    assert check(good, "--eval", other, "--strict")[0] == 0
    assert check(good, "--eval", good)[0] == 0
    assert check(good, "--eval", good, "--strict")[0] == 1


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_cannot_be_read_exits_2_with_one_line(check, tmp_path, name):
    content, message = BAD_FILES[name]
    ending = ".jsonl.gz" if name.endswith(".gz") else ".jsonl"
    path = tmp_path / f"pairs{ending}"
    path.write_bytes(content)
    code, _, err = check(path)
    assert code == 2
    assert message in err and str(path) in err and err.count("\n") == 1
    assert not (tmp_path / "check/check.html").exists()


def test_a_row_that_cannot_be_read_is_named_with_line_and_column(check, tmp_path):
    rows = [*GOOD, {"prompt": "a", "chosen": None, "rejected": "b"}]
    code, out, _ = check(write(tmp_path / "pairs.jsonl", rows))
    assert code == 0
    assert "Column 'chosen' is null" in out and "line 31" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl"], "no such file"),
        (["nowhere.yaml"], "no such file"),
        ([DEMO, "--show", "3"], "--show needs --model"),
        ([DEMO, "--show", "4000", "--model", MODEL], "there is no row 4000; the last one is line"),
        ([DEMO, "--max-length", "1"], "max_length must be at least 2"),
        ([DEMO, "--overlong-rows", "keep"], "overlong_rows must be drop or cut_prompt"),
        ([DEMO, "--by", "topic"], "no column 'topic'"),
        ([DEMO, "--output", DEMO], "--output"),
        ([DEMO, "--column-mapping", "{prompt: "], "cannot read the value"),
        ([DEMO, "--column-mapping", "prompt"], "column_mapping must be a mapping or null"),
        ([DEMO, "--column-mapping", "{question: prompt}"], "write prompt: question"),
        ([DEMO, "--model", "./nowhere"], "nowhere"),
    ],
)
def test_a_mistake_exits_2_with_one_line(check, words, message):
    code, _, err = check(*words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_configuration_names_data_model_and_lengths(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset_name: a.jsonl\neval_dataset_name: b.jsonl\nmodel_name_or_path: m\n"
        "max_length: 77\noverlong_rows: cut_prompt\non_bad_row: error\n"
        "bf16: true\nlearning_rate: 1e-4\n"
    )
    target = resolve_target(str(config))
    assert (target.data.dataset_name, target.data.eval_dataset_name) == ("a.jsonl", "b.jsonl")
    assert target.model.model_name_or_path == "m"
    assert target.rule == (77, "cut_prompt") and target.on_bad_row == "error"
    assert resolve_target(str(config), max_length=9, model="n").rule.max_length == 9
    config.write_text("max_length: long\ndataset_name: a")
    with pytest.raises(ConfigError, match="config.yaml line 1: max_length must be"):
        resolve_target(str(config))
    config.write_text("on_bad_row: keep\ndataset_name: a")
    with pytest.raises(ConfigError, match="on_bad_row must be drop or error"):
        resolve_target(str(config))
    config.write_text("seed: 3")
    with pytest.raises(ConfigError, match="dataset_name is not set"):
        resolve_target(str(config))


def test_columns_are_mapped_on_the_command_line_as_in_a_configuration(check, tmp_path):
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = [{names[key]: value for key, value in row.items()} for row in GOOD]
    path = write(tmp_path / "pairs.jsonl", rows)
    code, out, err = check(path, "--column-mapping", "{prompt: q, chosen: good, rejected: bad}")
    assert code == 0 and "30 pairs" in out, err
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset_name: {path}\ncolumn_mapping: {{prompt: x, chosen: good}}\n")
    target = resolve_target(str(config), column_mapping="{prompt: null}")
    assert target.data.column_mapping == {"prompt": None}
    assert resolve_target(str(config), column_mapping="null").data.column_mapping is None


def test_a_bad_row_is_serious_where_the_configuration_stops_at_it(check, tmp_path):
    write(tmp_path / "pairs.jsonl", [*GOOD, {"prompt": "a", "chosen": None, "rejected": "b"}])
    config = tmp_path / "config.yaml"
    for on_bad_row, code in (("drop", 0), ("error", 1)):
        config.write_text(f"dataset_name: pairs.jsonl\non_bad_row: {on_bad_row}\n")
        assert check(config, "--strict")[0] == code


def test_the_default_length_is_the_trainers():
    from lite_orpo.config.orpo_config import ORPOConfig

    assert DEFAULT_MAX_LENGTH == ORPOConfig.max_length


def test_a_folders_test_split_is_held_out(check, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    assert check(folder)[0] == 0
    write(folder / "test.jsonl", GOOD[:5])
    _, out, _ = check(folder)
    assert "5 of 5 held-out prompts also trained on" in out


def test_a_limit_beyond_the_models_positions_is_lowered(check, tmp_path):
    code, out, _ = check(write(tmp_path / "pairs.jsonl", GOOD), "--model", MODEL)
    assert code == 0 and "max_length 1024 is beyond the model's 256 positions" in out


def test_show_prints_each_token_and_what_is_scored(check, tmp_path):
    row = {"prompt": "How?\n", "chosen": "Do\tit.", "rejected": "No."}
    path = write(tmp_path / "pairs.jsonl", [GOOD[0], row])
    code, out, err = check(path, "--model", MODEL, "--show", "2", "--max-length", "64")
    assert code == 0, err
    assert "line 2" in out and "scored (a label)" in out
    from transformers import AutoTokenizer

    from lite_orpo.data.formats.rows import parse_row
    from lite_orpo.data.tokens.tokenization import tokenize_pair

    pair = tokenize_pair(parse_row(row), AutoTokenizer.from_pretrained(MODEL))
    assert f"prompt: {len(pair.prompt)} tokens, {len(pair.prompt) - 1} scored" in out
    assert f"chosen: {len(pair.chosen)} tokens, {len(pair.chosen)} scored, ends in EOS" in out
    assert "⏎│" in out and "⇥" in out and "<|eos|>│" in out
    assert not (tmp_path / "check").exists()


def test_show_cuts_a_prompt_as_training_does(check, tmp_path):
    row = {"prompt": "FIRST words are cut. " * 9 + "LAST?", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "pairs.jsonl", [row])
    words = [path, "--model", MODEL, "--show", 1, "--max-length", 20]
    _, out, _ = check(*words, "--overlong-rows", "cut_prompt")
    from transformers import AutoTokenizer

    from lite_orpo.data.formats.rows import parse_row
    from lite_orpo.data.tokens.tokenization import tokenize_pair

    pair = tokenize_pair(parse_row(row), AutoTokenizer.from_pretrained(MODEL))
    kept = 20 - max(len(pair.chosen), len(pair.rejected))
    assert f"prompt: {kept} tokens" in out
    assert f"{len(pair.prompt) - kept} tokens of the prompt, behind its first one, are cut" in out
    _, out, _ = check(*words)
    assert f"prompt: {len(pair.prompt)} tokens" in out and "the row is left out" in out


def test_show_says_which_files_have_the_row_and_takes_the_files_name(check, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        write(folder / f"train-0000{i}-of-00002.jsonl", GOOD[10 * i : 10 * (i + 1 + i)])
    code, _, err = check(folder, "--model", MODEL, "--show", 2)
    assert code == 2 and err.count("\n") == 1
    assert "2 files have a row 2: train-00000-of-00002.jsonl line 2, train-00001" in err
    place = "train-00001-of-00002.jsonl line 2"
    code, out, err = check(folder, "--model", MODEL, "--show", place)
    assert code == 0 and place in out and "11" in out.replace("│", ""), err
    code, out, _ = check(folder, "--model", MODEL, "--show", 15)
    assert code == 0 and "train-00001-of-00002.jsonl line 15" in out, "one file only has it"
    code, _, err = check(folder, "--model", MODEL, "--show", "train-00002-of-00002.jsonl line 2")
    assert code == 2 and "there is no row train-00002" in err


def test_show_puts_a_character_of_several_tokens_behind_the_last(check, tmp_path):
    row = {"prompt": "How?", "chosen": "a 日 b", "rejected": "No."}
    _, out, _ = check(write(tmp_path / "pairs.jsonl", [row]), "--model", MODEL, "--show", 1)
    assert "‥│" in out and "日│" in out and "\ufffd" not in out


def test_help_and_a_check_without_a_model_load_no_torch():
    code = (
        "import sys, tempfile\n"
        "from lite_orpo.cli.main import app\n"
        "for words in (['check', '--help'], ['check', sys.argv[1], '-o', tempfile.mkdtemp()]):\n"
        "    try:\n        app(words)\n"
        "    except SystemExit as stopped:\n        assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, DEMO],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr


def test_few_prompts_are_said_to_be_too_few_for_the_rules(check, tmp_path):
    words = "too few prompts to judge (fewer than 20 in a half)"
    assert words in check(write(tmp_path / "few.jsonl", GOOD[:20]))[1]
    assert words not in check(DEMO)[1]
