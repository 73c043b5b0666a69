"""`lite-orpo train` from a user's side: second runs, resuming, and what must not be mixed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lite_orpo.report.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


def test_a_second_run_is_refused_until_it_may_overwrite(train):
    assert train()[0] == 0
    code, error, folder = train()
    assert code == 2 and "holds an earlier run" in error
    before = load_file(folder / "adapter_model.safetensors")
    assert train("overwrite_output_dir=true", "seed=5")[0] == 0
    after = load_file(folder / "adapter_model.safetensors")
    assert any(not (before[name] == after[name]).all() for name in before)


def test_overwriting_leaves_nothing_of_the_earlier_run_to_be_loaded(train):
    assert train("save_strategy=steps", "save_steps=2")[0] == 0
    code, _, folder = train("overwrite_output_dir=true", "use_peft=false")
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not {"adapter_model.safetensors", "adapter_config.json", "checkpoint-4"} & names


def test_a_run_that_fails_at_its_data_costs_nothing_and_blocks_nothing(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    code, error, folder = train(f"dataset_name={bad}")
    assert code == 2 and "column 'rejected' is missing" in error
    assert train()[0] == 0
    figures = (folder / "metrics.jsonl").read_text()
    assert train(f"dataset_name={bad}", "overwrite_output_dir=true")[0] == 2
    assert (folder / "metrics.jsonl").read_text() == figures
    assert (folder / "adapter_model.safetensors").exists()


def test_resuming_the_newest_checkpoint_ends_as_the_unbroken_run(train):
    code, _, folder = train("save_strategy=steps", "save_steps=2")
    assert code == 0
    unbroken = load_file(folder / "adapter_model.safetensors")
    figures = read_metrics(folder / "metrics.jsonl")
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    words = ("save_strategy=steps", "save_steps=2")
    code, error, _ = train(*words, f"resume_from_checkpoint={folder}/checkpoint-4")
    assert code == 2 and "is no complete checkpoint: trainer_state.json cannot be read" in error
    assert f"the newest complete one here is {folder}/checkpoint-2" in error
    code, error, _ = train(*words, f"resume_from_checkpoint={folder}/checkpoint-2")
    assert code == 0, error
    resumed = load_file(folder / "adapter_model.safetensors")
    assert all((unbroken[name] == resumed[name]).all() for name in unbroken)
    again = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in again if "loss" in line] == [1, 2, 3, 4]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (figures, again)]
    assert losses[0] == losses[1]


def test_resume_true_takes_the_newest_checkpoint_or_says_there_is_none(train):
    code, error, folder = train("resume_from_checkpoint=true")
    assert code == 2 and "--resume needs a checkpoint" in error and "holds none" in error
    assert train("save_strategy=steps", "save_steps=2")[0] == 0
    assert train("resume_from_checkpoint=true", "max_steps=6")[0] == 0
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_best_checkpoints_figures_are_the_best_checkpoints(train):
    words = ["eval_strategy=steps", "eval_steps=1", "save_strategy=steps", "save_steps=1"]
    words += ["load_best_model_at_end=true", "metric_for_best_model=loss"]
    # The highest loss counts as the best here, so that the first steps' weights are kept.
    code, error, folder = train(*words, "greater_is_better=true", "warmup_steps=0")
    assert code == 0, error
    evaluations = [m for m in read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]
    best = max(line["eval_loss"] for line in evaluations if line["step"] > 0)
    assert evaluations[-2]["eval_loss"] < best  # the last step is not the one that was kept
    assert evaluations[-1]["eval_loss"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora_modules_to_save=[lm_hed]", "has no module 'lm_hed'"),
        ("lora_target_modules=[q_porj]", "the adapter does not fit"),
        ("report_to=tensorbord", "tensorbord is not supported"),
        ("loss_backend=tritn", "loss_backend: backend='tritn' is unknown"),
        ("model_name_or_path=examples/demo_data", "the folder has no config.json"),
        ("resume_from_checkpoint=nowhere", "is no complete checkpoint"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_2(train, word, message):
    code, error, _ = train(word)
    lines = [line for line in error.splitlines() if line]
    assert code == 2, error
    assert len(lines) == 1 and message in lines[0], error


def test_triton_without_a_gpu_is_refused_in_one_line(train, monkeypatch):
    monkeypatch.setattr("lite_orpo_kernels.backends._kernels_are_interpreted", lambda: False)
    code, error, _ = train("loss_backend=triton")
    assert code == 2 and 'loss_backend: backend="triton" needs a GPU' in error
    assert len(error.splitlines()) == 1


def test_the_base_models_folder_is_never_written(train, tmp_path):
    code, error, _ = train("output_dir=examples/demo_model", "overwrite_output_dir=true")
    assert code == 2 and "base model's own folder" in error
    assert json.loads((ROOT / "examples/demo_model/config.json").read_text())


def test_one_name_for_the_target_modules_is_enough(train):
    code, error, folder = train("lora_target_modules=q_proj")
    assert code == 0, error
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


@pytest.fixture(scope="module")
def model_with_a_hole(tmp_path_factory):
    """The demo's model, to which one word of the vocabulary is infinite; and that word."""
    folder = tmp_path_factory.mktemp("hole")
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples/demo_model", tie_word_embeddings=False
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/demo_model")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
        word = tokenizer("q", add_special_tokens=False)["input_ids"][-1]
        model.get_input_embeddings().weight[word] = torch.inf
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_refused_steps_are_in_the_metrics_the_progress_and_the_end(
    logging_steps, train, model_with_a_hole, tmp_path
):
    """Of four steps, the one that is refused is told even where no log line follows it."""
    rows = [
        {"prompt": f"Say {i}", "chosen": f" Yes {i}.", "rejected": f" No {i}."} for i in range(8)
    ]
    data = tmp_path / "few.jsonl"

    def run(name, *words):
        data.write_text("\n".join(map(json.dumps, rows)))
        model = f"model_name_or_path={model_with_a_hole}"
        few = ("per_device_train_batch_size=2", "eval_dataset_name=null", "num_train_epochs=1")
        code, error, _ = train(
            model, f"dataset_name={data}", *few, f"output_dir={tmp_path / name}",
            f"logging_steps={logging_steps}", "train_sampling_strategy=sequential", *words,
        )  # fmt: skip
        assert code == 0, error
        return read_metrics(tmp_path / name / "metrics.jsonl"), train.output

    lines, said = run("good")
    assert sum(line.get("lite_orpo/refused_steps", 0) for line in lines) == 0
    assert "not taken" not in said and "steps refused" not in said
    rows[7]["chosen"] = " qqq"
    lines, said = run("bad")
    assert sum(line.get("lite_orpo/refused_steps", 0) for line in lines) == 1
    assert "1 step was not taken, for a loss or gradient that was not finite" in said
    assert ("steps refused 1" in said) == (logging_steps == 1)
    weights = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
