"""The command line: fast help, overrides, init and env, and exit 2 with one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lite_orpo.cli.init import write_template
from lite_orpo.cli.main import run
from lite_orpo.cli.overrides import split_arguments
from lite_orpo.errors import ConfigError

ROOT = Path(__file__).parents[2]


def run_cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lite_orpo.cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["init", "--help"],
        ["eval", "--help"],
        ["chat", "--help"],
        ["generate", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from lite_orpo.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_train_help_names_the_common_keys():
    text = run_cli("train", "--help").stdout
    for key in ("model_name_or_path", "dataset_name", "learning_rate", "lora_r", "beta"):
        assert key in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c.yaml", "seed=3"], {"seed": 3}),
        (["c.yaml", "--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate=1e-4", "c.yaml"], {"learning_rate": 1e-4}),
        (["c.yaml", "--use_dora", "--seed", "3"], {"use_dora": True, "seed": 3}),
        (
            ["c.yaml", "lora_target_modules=[q_proj, v_proj]"],
            {"lora_target_modules": ["q_proj", "v_proj"]},
        ),
        (["c.yaml", "max_length=null"], {"max_length": None}),
        (["c.yaml", "run_name=a=b"], {"run_name": "a=b"}),
    ],
)
def test_overrides_are_read_in_every_spelling(words, expected):
    path, overrides = split_arguments(words, None)
    assert path == Path("c.yaml")
    assert {k: s.value for k, s in overrides.items()} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no configuration file"),
        (["a.yaml", "b.yaml"], "'b.yaml' is neither key=value nor the configuration"),
        (["a.yaml", "seed=1", "seed=2"], "seed is given twice"),
        (["a.yaml", "=3"], "has no key"),
        (["a.yaml", "x=["], "cannot read the value"),
    ],
)
def test_a_wrong_word_is_refused(words, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        split_arguments(words, None)


def test_init_writes_once_and_never_replaces_silently(tmp_path):
    path = tmp_path / "config.yaml"
    write_template(path, force=False)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_template(path, force=False)
    assert path.read_text() == "mine"
    write_template(path, force=True)
    assert "model_name_or_path" in path.read_text()


def test_env_names_the_backend_and_its_reason():
    done = run_cli("env")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "chunked" in done.stdout and "pure PyTorch" in done.stdout


MISTAKES = [
    (["nope.yaml"], "nope.yaml: no such file"),
    (["examples/demo.yaml", "learning_rat=1"], "unknown key learning_rat; did you mean"),
    (["examples/demo.yaml", "model_name_or_path=./none"], "model_name_or_path: ./none: no such"),
    (["examples/demo.yaml", "dataset_name=none.jsonl"], "none.jsonl: no such file"),
    (
        ["examples/demo.yaml", "model_name_or_path=nobody/nothing"],
        "is no local folder, and the hub",
    ),
    (["examples/demo.yaml", "dataset_name=nobody/nothing"], "is no local file, and the hub"),
    (["examples/demo.yaml", "eval_dataset_name=null"], "there are no held-out pairs"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["lite-orpo", "train", *words, f"output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_a_mistake_leaves_a_process_with_one_line_and_exit_2(tmp_path):
    done = run_cli("train", "nope.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("lite-orpo: error: nope.yaml: no such file")
    assert done.stderr.count("\n") == 1
