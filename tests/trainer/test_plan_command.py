"""`lite-orpo plan` as it is typed: the table, the verdict, and what to change."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import memory_worker
import pytest
from memory_worker import WIDE
from tiny_models import TOKENIZER, tiny_config
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from lite_orpo.cli.main import app


@pytest.fixture
def config_file(tmp_path):
    tiny_config("llama", **WIDE).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    pairs = "\n".join(json.dumps(row) for row in memory_worker.rows(40))
    (tmp_path / "pairs.jsonl").write_text(pairs)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'base'}\ndataset_name: {tmp_path / 'pairs.jsonl'}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return path


@pytest.fixture(autouse=True)
def libraries_speak_again(monkeypatch):
    """The command lets libraries be quiet, for the rest of its process."""
    logger = logging.getLogger("lite_orpo")
    handlers, propagate, verbosity = (
        logger.handlers,
        logger.propagate,
        transformers_logging.get_verbosity(),
    )
    with warnings.catch_warnings():
        yield
    logger.handlers, logger.propagate = handlers, propagate
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def run_plan(*words):
    done = CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "120"})
    return done.exit_code, done.output


def test_the_command_prints_a_table_and_whether_it_fits(config_file):
    code, text = run_plan(config_file, "--vram", "24")
    assert code == 0, text
    for name in ("linear layers", "adapter", "gradients", "optimiser", "head and loss"):
        assert name in text
    assert "Fits in 24 GiB" in text
    assert "computed, not measured" in text
    assert not (config_file.parent / "out").exists()


def test_what_does_not_fit_is_answered_with_what_to_change(config_file):
    code, text = run_plan(config_file, "--vram", "0.8", "gradient_checkpointing=false")
    assert code == 0, text
    assert "Does not fit in 0.8 GiB" in text
    advice = text[text.index("least harm first") :]
    assert "gradient_checkpointing: true" in advice
    assert "fits" in advice


def test_a_mistake_is_one_line_and_exit_2(config_file):
    done = subprocess.run(
        [sys.executable, "-m", "lite_orpo.cli.main", "plan", str(config_file), "--vram", "-3"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 2
    assert "--vram must be a positive number of GiB, found -3" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_untied_embedding_can_go_to_the_host_before_anything_is_rounded(config_file):
    # An embedding of 3 GiB in bf16 that only the host has room for.
    tiny_config("llama", **WIDE).save_pretrained(config_file.parent / "base")
    path = config_file.parent / "base" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"vocab_size": 400_000, "hidden_size": 4096, "tie_word_embeddings": False}
    path.write_text(json.dumps(settings))
    code, text = run_plan(config_file, "--vram", "6")
    assert code == 0, text
    advice = text[text.index("least harm first") :].splitlines()
    assert advice[-1].strip().startswith("offload_embedding: true (the same result")
    assert advice[-1].endswith("fits")
    tied = {**settings, "tie_word_embeddings": True}
    path.write_text(json.dumps(tied))
    code, text = run_plan(config_file, "--vram", "2")
    assert "offload_embedding" not in text


def test_auto_takes_the_most_tokens_that_fit(config_file):
    code, roomy = run_plan(config_file, "--vram", "24", "max_tokens_per_row=auto")
    assert code == 0, roomy
    assert "max_tokens_per_row: auto takes 8,192" in roomy
    settings = ("max_tokens_per_row=auto", "gradient_checkpointing=false")
    code, tight = run_plan(config_file, "--vram", "0.75", *settings)
    assert code == 0, tight
    (taken,) = re.findall(r"auto takes ([\d,]+)", tight)
    assert int(taken.replace(",", "")) < 8192
    assert "Fits in 0.75 GiB" in tight


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_card_that_is_not_here_may_compute_in_half_precision(half, config_file):
    code, text = run_plan(config_file, "--vram", "24", f"{half}=true")
    assert code == 0, text
    assert ("bfloat16" if half == "bf16" else "float16") in text


@pytest.mark.parametrize("vram", ["nan", "inf", "0"])
def test_a_card_has_a_size(vram, config_file):
    done = CliRunner().invoke(app, ["plan", str(config_file), "--vram", vram])
    assert "--vram must be a positive number" in str(done.exception)


def test_pairs_beyond_the_models_positions_are_planned_as_they_will_be_trained(config_file):
    config = tiny_config("llama", **{**WIDE, "max_position_embeddings": 100})
    config.save_pretrained(config_file.parent / "base")
    code, text = run_plan(config_file, "--vram", "24", "overlong_rows=cut_prompt")
    assert code == 0, text
    assert text.count("is beyond the model's 100 positions: 100 is used") == 1


def test_sft_is_planned_without_the_rejected_answers_that_it_does_not_pass(config_file):
    def tokens(*words):
        code, text = run_plan(config_file, *words)
        assert code == 0, text
        return int(re.search(r"pairs, ([0-9,]+) tokens", text).group(1).replace(",", ""))

    assert tokens("loss_type=sft") < 0.8 * tokens("loss_type=dpo")
