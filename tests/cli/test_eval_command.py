"""`lite-orpo eval` from a user's side: the run's own figures, groups, files, and mistakes."""

import json
import shutil
import weakref

import pytest

from lite_orpo.cli.target import load_target_model
from lite_orpo.report.metrics_file import read_metrics


def with_source(path, name="source"):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row[name] = "first" if number < 8 else "second"
    grouped = path.parent / f"with_{name}.jsonl"
    grouped.write_text("\n".join(map(json.dumps, rows)))
    return grouped


def test_the_figures_are_those_of_the_runs_own_evaluations(train, command):
    code, error, folder = train("eval_strategy=epoch", "beta=0.3", "max_steps=8")
    assert code == 0, error
    logged = [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line]
    before, after = logged[0], logged[-1]
    assert before["eval_rewards/margins"] != after["eval_rewards/margins"]
    code, said, error = command("eval", folder, "--data", folder.parent / "held_out.jsonl")
    assert code == 0, error
    figures = json.loads((folder / "eval.json").read_text())["overall"]["figures"]
    for key, name in (
        ("accuracy", "eval_rewards/accuracies"),
        ("reward_margin", "eval_rewards/margins"),
        ("log_odds", "eval_log_odds_chosen"),
    ):
        assert figures[key]["before"]["value"] == pytest.approx(before[name], abs=1e-5)
        assert figures[key]["after"]["value"] == pytest.approx(after[name], abs=1e-5)


def test_groups_files_and_words_are_written(demo_run, command, tmp_path):
    data = with_source(demo_run.parent / "held_out.jsonl")
    code, said, error = command("eval", demo_run, "--data", data, "-o", tmp_path / "out")
    assert code == 0, error
    assert "With the adapter the chosen answer is likelier" in said and "By source" in said
    assert "12 pairs are few" in said
    result = json.loads((tmp_path / "out/eval.json").read_text())
    assert [(group["value"], group["pairs"]) for group in result["groups"]] == [
        ("first", 8),
        ("second", 4),
    ]
    assert result["base"] == "demo_model" and result["data"] == data.name
    assert result["overall"]["figures"]["implicit_accuracy"]["after"]["value"] != 0.5
    assert (tmp_path / "out/eval.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(result)


def test_a_column_is_named_by_the_user_and_one_that_says_nothing_is_left_out(
    demo_run, command, tmp_path
):
    data = with_source(demo_run.parent / "held_out.jsonl", "topic")
    code, said, _ = command("eval", demo_run, "--data", data, "--by", "topic", "-o", tmp_path)
    assert code == 0 and "By topic" in said
    code, said, _ = command("eval", demo_run, "--data", data, "--by", "prompt", "-o", tmp_path)
    assert code == 0 and "it makes no groups" in said and "By prompt" not in said


def models_at_a_time(monkeypatch):
    """How many of the models that were loaded before are still there, at each loading."""
    loaded, seen = [], []

    def load(target, *, is_scored):
        seen.append(sum(model() is not None for model in loaded))
        model = load_target_model(target, is_scored=is_scored)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("lite_orpo.cli.score_target.load_target_model", load)
    return seen


def test_a_whole_model_is_compared_with_the_base_that_is_named(
    command, demo_run, tmp_path, monkeypatch
):
    data = demo_run.parent / "held_out.jsonl"
    words = ("examples/demo_model", "--data", data, "-o", tmp_path)
    code, said, error = command("eval", *words)
    assert code == 0, error
    alone = json.loads((tmp_path / "eval.json").read_text())["overall"]["figures"]
    assert "before" not in alone["accuracy"] and "implicit_accuracy" not in alone
    twin = tmp_path / "twin"
    shutil.copytree("examples/demo_model", twin)
    seen = models_at_a_time(monkeypatch)
    code, said, error = command("eval", *words, "--base", twin)
    assert code == 0, error
    assert seen == [0, 0]  # the first model is gone when the second is loaded
    both = json.loads((tmp_path / "eval.json").read_text())["overall"]["figures"]
    assert both["accuracy"]["before"] == both["accuracy"]["after"] == alone["accuracy"]["after"]


def test_a_whole_model_without_its_base_is_looked_at_alone(command, demo_run, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree("examples/demo_model", folder)
    settings = (demo_run / "config.resolved.yaml").read_text().splitlines()[1:]
    (folder / "config.resolved.yaml").write_text(
        "\n".join(["model_name_or_path: my/base", *settings])
    )
    code, said, error = command("eval", folder)
    assert code == 0 and "its base, my/base, is not here" in said, error
    code, _, error = command("eval", folder, "--base", "my/base")
    assert code == 2 and "my/base" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "TARGET not given"),
        (["./nowhere"], "./nowhere: no such folder"),
        (["examples/demo_data"], "holds no adapter and no model"),
        (["examples/demo_model"], "names no held-out pairs"),
        (["examples/demo.yaml", "output_dir=nowhere"], "holds nothing trained yet"),
        (["RUN", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["RUN", "--by", "topik"], "there is no column 'topik'"),
        (["RUN", "bata=1"], "unknown key bata; did you mean beta?"),
        (["RUN", "other"], "'other' is neither key=value nor TARGET"),
        (["RUN", "-o", "README.md"], "README.md cannot be written"),
        (["RUN", "--base", "examples/demo_data"], "the folder has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(demo_run, command, words, message, tmp_path):
    words = [str(demo_run) if word == "RUN" else word for word in words]
    code, _, error = command("eval", *words, *([] if "-o" in words else ["-o", tmp_path]))
    lines = [line for line in error.splitlines() if "lite-orpo: error" in line]
    assert code == 2 and len(lines) == 1 and message in lines[0], error


def test_an_adapter_that_does_not_fit_its_base_is_one_line(demo_run, command, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(demo_run, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, error = command("eval", folder)
    assert code == 2 and "damaged" in error and len(error.splitlines()) == 1
    settings = json.loads((folder / "adapter_config.json").read_text())
    shutil.copy(demo_run / weights.name, weights)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 7}))
    code, _, error = command("eval", folder)
    assert code == 2 and "does not fit the base model" in error and len(error.splitlines()) == 1


def test_a_base_that_is_gone_is_told_with_who_names_it(demo_run, command, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(demo_run, folder)
    config = (folder / "config.resolved.yaml").read_text()
    lines = ["model_name_or_path: my/base", *config.splitlines()[1:]]
    (folder / "config.resolved.yaml").write_text("\n".join(lines))
    code, _, error = command("eval", folder)
    assert code == 2 and "config.resolved.yaml names it" in error and "--base" in error


def test_held_out_pairs_that_are_not_here_are_told_with_who_names_them(demo_run, command, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(demo_run, folder)
    config = folder / "config.resolved.yaml"
    config.write_text(config.read_text() + "eval_dataset_name: pairs/held_out.jsonl\n")
    lines = [line for line in config.read_text().splitlines() if str(demo_run.parent) not in line]
    config.write_text("\n".join(lines) + "\n")
    code, _, error = command("eval", folder)
    assert code == 2 and "pairs/held_out.jsonl: no such file" in error
    assert "run's configuration names it" in error and "--data" in error
    assert len(error.splitlines()) == 1
    code, _, error = command("eval", folder, "--data", "gone.jsonl")
    assert code == 2 and "configuration names it" not in error


def test_a_checkpoint_is_a_target_with_its_runs_configuration(demo_run, command, tmp_path):
    folder = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(demo_run, folder)
    (folder / "config.resolved.yaml").rename(folder.parent / "config.resolved.yaml")
    code, _, error = command("eval", folder, "-o", tmp_path)
    assert code == 0, error
    code, _, error = command("eval", folder.parent)
    assert code == 2 and "holds no adapter and no model" in error
