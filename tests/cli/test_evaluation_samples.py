"""`sample_at_evaluations`: shown and logged at each evaluation, without a trace in the training."""

import pytest
from safetensors.torch import load_file

from lite_orpo.report.curves import draw_curves
from lite_orpo.report.metrics_file import read_metrics

WORDS = ("eval_strategy=steps", "eval_steps=2", "lora_dropout=0.2", "sample_prompts=2")
WORDS += ("sample_max_new_tokens=12", "save_strategy=steps", "save_steps=2")


def test_a_run_with_samples_ends_bit_for_bit_where_one_without_does(train, tmp_path):
    code, error, folder = train(*WORDS)
    assert code == 0, error
    without = load_file(folder / "adapter_model.safetensors")
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    other = tmp_path / "with"
    code, error, _ = train(*WORDS, "sample_at_evaluations=true", f"output_dir={other}")
    assert code == 0, error
    having = load_file(other / "adapter_model.safetensors")
    assert without.keys() == having.keys()
    assert all((without[name] == having[name]).all() for name in without)
    lines = read_metrics(other / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == losses
    samples = [line for line in lines if "samples" in line]
    assert [line["step"] for line in samples] == [2, 4]
    for line in samples:
        assert [set(item) for item in line["samples"]] == [{"prompt", "before", "after"}] * 2
    # The model before training is one model.
    befores = [[item["before"] for item in line["samples"]] for line in samples]
    assert befores[0] == befores[1] and all(befores[0])
    assert draw_curves(lines, tmp_path / "curves.png", "title")

    # A resumed run reads the file with samples, drops what came later, and goes on with them.
    code, error, _ = train(
        *WORDS,
        "sample_at_evaluations=true",
        f"output_dir={other}",
        f"resume_from_checkpoint={other}/checkpoint-2",
    )
    assert code == 0, error
    resumed = load_file(other / "adapter_model.safetensors")
    assert all((without[name] == resumed[name]).all() for name in without)
    again = [line for line in read_metrics(other / "metrics.jsonl") if "samples" in line]
    assert [line["step"] for line in again] == [2, 4] and again[1] == samples[1]


@pytest.mark.parametrize("word", ["eval_strategy=no", "sample_prompts=0"])
def test_samples_at_evaluations_that_never_come_are_refused(train, word):
    words = [each for each in WORDS if each.split("=")[0] != word.split("=")[0]]
    code, error, _ = train(*words, word, "sample_at_evaluations=true")
    assert code == 2 and "sample_at_evaluations needs" in error
    assert len(error.splitlines()) == 1
