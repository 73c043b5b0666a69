"""One run of each command with tokens around it and absolute paths: none is in what it leaves.

The commands run in a process of their own, which is not told to be offline and in which every
attempt to reach a network is noted and fails.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lite_orpo.cli.output_folder import own_files, remove_earlier_run
from lite_orpo.cli.overrides import split_arguments
from lite_orpo.cli.stopped import command_to_go_on
from lite_orpo.config.run_config import load_run_config
from lite_orpo.config.yaml_file import Setting
from lite_orpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
SECRET = "hf_secretsecretsecret"
USER = "zq_some_user"
GUARDED = """
import json, socket, sys, threading, traceback
attempts = []

def refuse(*given, **options):
    attempts.append("".join(traceback.format_stack(limit=8)))
    raise OSError("no network in this test")

class Guarded(socket.socket):
    def connect(self, *address):
        refuse() if self.family != socket.AF_UNIX else super().connect(*address)
    connect_ex = connect

socket.socket = Guarded
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
from lite_orpo.cli.main import run
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["lite-orpo", *words]
    try:
        run()
        codes.append(0)
    except SystemExit as stopped:
        codes.append(stopped.code or 0)
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(10)
print("CODES", codes)
print("ATTEMPTS", len(attempts), *attempts[:3])
"""
SETTINGS = {
    "use_cpu": True, "max_length": 128, "max_steps": 2, "logging_steps": 1,
    "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1,
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
    "save_total_limit": 1, "sample_prompts": 1, "sample_max_new_tokens": 2, "report_to": "none",
    "hub_token": SECRET,
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Everything that was written, and what was printed."""
    home = tmp_path_factory.mktemp("home") / USER
    given = home / "given"
    shutil.copytree(ROOT / "examples/demo_model", given / "base")
    # As older libraries wrote them.
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        settings = json.loads((given / "base" / name).read_text())
        (given / "base" / name).write_text(json.dumps({**settings, key: f"{given}/base"}))
    lines = (ROOT / "examples/demo_data/train.jsonl").read_text().splitlines()
    (given / "pairs.jsonl").write_text("\n".join(lines[:12]))
    (given / "held_out.jsonl").write_text("\n".join(lines[10:14]))
    config = {
        **SETTINGS, "model_name_or_path": f"{given}/base", "output_dir": f"{home}/out/adapter",
        "dataset_name": f"{given}/pairs.jsonl", "eval_dataset_name": f"{given}/held_out.jsonl",
    }  # fmt: skip
    (given / "c.yaml").write_text(yaml.safe_dump(config))
    path = str(given / "c.yaml")
    commands = [
        ["train", path],
        ["train", path, f"output_dir={home}/out/whole", "use_peft=false", "sample_prompts=0"],
        ["check", path, "-o", f"{home}/out/check"],
        ["plan", path, "--vram", "8"],
        ["env"],
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, json.dumps(commands)],
        env={**environment, **dict.fromkeys(tokens, SECRET), "HOME": str(home),
             "HF_HOME": f"{home}/hf"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "CODES [0, 0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr
    return home, done.stdout + done.stderr


def texts_in(path):
    """A file's bytes, and of a picture the texts in its compressed chunks."""
    content = path.read_bytes()
    yield content
    at = 8
    while content.startswith(b"\x89PNG") and at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if kind in (b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
            for start in range(len(body)):
                try:
                    yield zlib.decompress(body[start:])
                except zlib.error:
                    continue
        at += 12 + length


def files_with(folder, word):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [p for p in files if any(word.encode() in text for text in texts_in(p))]


def test_the_search_finds_what_is_there(tmp_path):
    packed = b"Comment\0\0" + zlib.compress(USER.encode())
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + b"\0\0\0\0"
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (tmp_path / "b.bin").write_bytes(b"\0\1" + USER.encode())
    assert len(files_with(tmp_path, USER)) == 2


@pytest.mark.parametrize("word", [SECRET, USER], ids=["token", "absolute path"])
def test_no_written_file_has_it(told, word):
    home, _ = told
    names = {path.name for path in (home / "out").rglob("*")}
    assert {"adapter_config.json", "model.safetensors", "curves.png", "check.html", "README.md",
            "trainer_state.json", "config.resolved.yaml", "checkpoint-2"} <= names  # fmt: skip
    assert files_with(home / "out", word) == []


def test_no_token_is_printed(told):
    assert SECRET not in told[1]


def test_nothing_is_fetched_with_local_inputs(told):
    assert "ATTEMPTS 0\n" in told[1], told[1]


def test_the_adapter_loads_with_its_base_given(told):
    home, printed = told
    name = json.loads((home / "out/adapter/adapter_config.json").read_text())
    # With the dot it is no name on the hub.
    assert name["base_model_name_or_path"] == "./base"
    base = AutoModelForCausalLM.from_pretrained(home / "given/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, home / "out/adapter")
    assert any("lora_" in key for key, _ in model.named_parameters())
    assert f'AutoModelForCausalLM.from_pretrained("{home}/given/base")' in printed
    card = (home / "out/adapter/README.md").read_text()
    assert "`base` was a local folder" in card and "base_model:" not in card


def test_the_resolved_configuration_runs_again_with_its_paths_given_anew(told):
    home, _ = told
    path = home / "out/adapter/config.resolved.yaml"
    again = load_run_config(path, {"model_name_or_path": Setting("x", "")})
    assert again.data.dataset_name == "./pairs.jsonl"
    assert again.training.max_steps == 2
    assert path.read_text().startswith("# Written by lite-orpo")


# ---- tokens on the terminal ----


@pytest.mark.parametrize("word", [f"hub_token=[{SECRET}]", f"hub_token=[{SECRET}"])
def test_a_token_that_cannot_be_read_is_not_shown(train, word):
    code, error, _ = train(word)
    assert code == 2 and "hub_token" in error
    assert SECRET not in error


def test_the_command_that_goes_on_has_no_token(tmp_path):
    given = {"hub_token": Setting(SECRET, ""), "seed": Setting(3, "")}
    assert command_to_go_on(tmp_path / "c.yaml", given).endswith("seed=3 --resume")
    _, read = split_arguments([str(tmp_path / "c.yaml"), f"hub_token={SECRET}"], None)
    assert read["hub_token"].value == SECRET


# ---- whose folder it is ----


def test_a_folder_that_holds_something_else_is_refused(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, error, folder = train()
    assert code == 2 and "holds something else (thesis.txt)" in error
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "checkpoint-7", "metrics.jsonl"])
def test_what_would_be_overwritten_is_refused_even_with_consent(train, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, error, folder = train("overwrite_output_dir=true")
    assert code == 2 and f"holds {name}, which no run of lite-orpo wrote" in error
    assert (folder / name).read_text() == "mine"


def test_logs_hidden_files_and_the_configuration_may_be_there(tmp_path, train, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("job.out", ".gitignore"):
        (folder / name).write_text("x")
    code, error, _ = train("dataset_name=nowhere.jsonl")
    assert code == 2 and "no such file" in error
    code, error, _ = train("model_name_or_path=./nowhere")
    assert code == 2 and "no such folder" in error  # the output folder was accepted


def run_folder(folder, use_peft):
    """What an earlier run left, and files of its user's among it."""
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "manifest.json").write_text("{}")
    (folder / "checkpoint-notes").mkdir()
    (folder / "checkpoint-9").mkdir()
    (folder / "config.resolved.yaml").write_text(f"use_peft: {str(use_peft).lower()}\n")
    for name in ("README.md", "config.json", "model.safetensors", "adapter_model.safetensors"):
        (folder / name).write_text("x")
    (folder / "model-notes.safetensors").write_text("x")
    return folder


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "whole model"])
def test_overwriting_removes_only_what_a_run_wrote(tmp_path, use_peft):
    folder = run_folder(tmp_path / "out", use_peft)
    weights = {"adapter_model.safetensors"} if use_peft else {"config.json", "model.safetensors"}
    names = [path.name for path in own_files(folder)]
    assert set(names) == {"checkpoint-2", "config.resolved.yaml", "README.md"} | weights
    assert names[-1] == "config.resolved.yaml"  # a removal that is cut off can be taken up
    before = {path.name for path in folder.iterdir()}
    remove_earlier_run(folder)
    assert {path.name for path in folder.iterdir()} == before - set(names)


def test_a_folder_without_a_runs_configuration_is_nobodys(tmp_path):
    folder = run_folder(tmp_path / "out", True)
    (folder / "config.resolved.yaml").unlink()
    assert [path.name for path in own_files(folder)] == ["checkpoint-2"]


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    folder = run_folder(tmp_path / "out", True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text("{}")
    (folder / "checkpoint-4").symlink_to(precious)
    (folder / "curves.png").symlink_to(precious / "manifest.json")
    remove_earlier_run(folder)
    assert (precious / "manifest.json").read_text() == "{}"
    assert not (folder / "curves.png").is_symlink()


# ---- hostile configurations ----

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!python/object/apply:os.system ['touch CANARY']", "could not determine a const"),
        ("!!python/object/apply:os.system ['touch CANARY']: 1", "could not determine a const"),
        ("seed: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS, "more than 10000 values"),
        (f"x: {{{LAUGHS.splitlines()[0]}}}\ny: &y {{<<: [*a, *a]}}", "not valid YAML"),
        ("seed: &s [*s]", "contains itself"),
        ("seed: " + "[" * 20_000, "nested too deeply"),
        ("run_name: 2024-13-45", "month must be"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("seed: [" + "x, " * 5000 + "x]", "found ['x', 'x'"),
    ],
    ids=["tag", "tag as key", "name", "laughs", "merge", "cycle", "deep", "date", "digits", "long"],
)
def test_a_hostile_configuration_runs_nothing_and_is_one_line(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("CANARY", str(tmp_path / "canary")))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, {})
    assert message in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "canary").exists()


def test_a_hostile_value_on_the_command_line_is_refused_too():
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        split_arguments(["c.yaml", "seed=!!python/object/apply:os.getcwd []"], None)
