"""The demo itself, shortened: one command, and everything it promises to leave behind."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from lite_orpo.model.adapter import adapter_switched_off
from lite_orpo.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`lite-orpo train examples/demo.yaml`, with fewer steps and a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lite_orpo.cli.main", "train", "examples/demo.yaml"]
    command += [f"output_dir={folder}", "max_steps=24", "eval_strategy=no", "logging_steps=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, printed=done.stdout, complaints=done.stderr)


def held_out(demo) -> tuple[dict, dict]:
    lines = [line for line in read_metrics(demo.folder / "metrics.jsonl") if "eval_loss" in line]
    return lines[0], lines[-1]


def test_it_learns_the_preference_on_held_out_pairs(demo):
    before, after = held_out(demo)
    assert before["step"] == 0 and after["step"] == 24
    # Half the steps of the demo; the README's figures are for all of them.
    assert after["eval_rewards/accuracies"] >= 0.8
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"] + 0.1
    assert after["eval_log_odds_chosen"] > before["eval_log_odds_chosen"] + 0.3
    assert after["eval_nll_loss"] < before["eval_nll_loss"]


def test_it_shows_progress_with_loss_margin_and_accuracy(demo):
    assert re.search(r"step 8/24: loss \d\.\d+ · margin -?\d\.\d+ · accuracy \d\.\d+", demo.printed)


def test_it_shows_three_answers_before_and_after(demo):
    assert demo.printed.count("before  ") == 3
    assert demo.printed.count("after   ") == 3


def test_it_ends_by_saying_where_everything_is_and_how_to_use_it(demo):
    end = demo.printed[demo.printed.index("Finished in") :]
    for name in ("metrics.jsonl", "curves.png", "AutoPeftModelForCausalLM.from_pretrained"):
        assert name in end


def test_nothing_is_complained_about(demo):
    assert "Warning" not in demo.complaints and "Traceback" not in demo.complaints


def test_adapter_metrics_curves_config_and_card_are_saved(demo):
    names = {path.name for path in demo.folder.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "metrics.jsonl",
        "curves.png",
        "config.resolved.yaml",
        "README.md",
    } <= names
    assert "training_args.bin" not in names
    assert (demo.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (demo.folder / "README.md").read_text()
    assert "| reward accuracy |" in card and "None" not in card


def test_the_saved_adapter_loads_and_changes_the_model(demo, monkeypatch):
    monkeypatch.chdir(ROOT)  # the base model is named by a path from here
    model = AutoPeftModelForCausalLM.from_pretrained(demo.folder)
    tokenizer = AutoTokenizer.from_pretrained(demo.folder)
    messages = [{"role": "user", "content": "How do I water my fern?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        trained = model(**ids).logits
        with adapter_switched_off(model):
            base = model(**ids).logits
    assert (trained - base).abs().max() > 0.1
