"""What a person looks at: metrics file, curves, progress lines, samples and card."""

import io
import json
from types import SimpleNamespace

from rich.console import Console

from lite_orpo.report.card import write_card
from lite_orpo.report.curves import draw_curves
from lite_orpo.report.metrics_file import MetricsFile, read_metrics
from lite_orpo.report.progress import TrainingProgress, short_figures

LOGS = {"loss": 1.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "log_odds_chosen": 0.3}


def state(step: int = 5) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=True)


def test_every_log_line_is_one_json_object(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    callback = MetricsFile(path, append=False)
    callback.on_log(None, state(1), None, logs=LOGS)
    callback.on_log(None, state(2), None, logs={"eval_loss": 1.0})
    assert read_metrics(path) == [{"step": 1, **LOGS}, {"step": 2, "eval_loss": 1.0}]


def test_a_resumed_run_goes_on_with_the_file_and_a_new_one_starts_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, append=False).on_log(None, state(1), None, logs=LOGS)
    MetricsFile(path, append=True).on_log(None, state(2), None, logs=LOGS)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsFile(path, append=False).on_log(None, state(7), None, logs=LOGS)
    assert [line["step"] for line in read_metrics(path)] == [7]


def test_a_run_that_never_logs_leaves_an_earlier_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("earlier\n")
    MetricsFile(path, append=False)
    assert path.read_text() == "earlier\n"


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, append=False)
    for step in (1, 2, 3):
        first.on_log(None, state(step), None, logs=LOGS)
    resumed = MetricsFile(path, append=True)
    resumed.on_train_begin(None, state(2), None)
    resumed.on_log(None, state(3), None, logs={"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        (1, 1.5),
        (2, 1.5),
        (3, 9.0),
    ]


def test_only_the_main_process_writes(tmp_path):
    other = state()
    other.is_world_process_zero = False
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, append=False).on_log(None, other, None, logs=LOGS)
    assert not path.exists()


def test_curves_become_a_png_with_held_out_points(tmp_path):
    metrics = [{"step": s, **LOGS} for s in (5, 10)]
    metrics.append({"step": 10, **{f"eval_{k}": v for k, v in LOGS.items()}})
    path = tmp_path / "curves.png"
    assert draw_curves(metrics, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_logged_draws_nothing(tmp_path):
    assert not draw_curves([{"step": 1, "train_runtime": 3.0}], tmp_path / "curves.png", "title")
    assert not (tmp_path / "curves.png").exists()


def test_progress_shows_loss_margin_and_accuracy():
    assert short_figures(LOGS) == "loss 1.500 · margin 0.250 · accuracy 0.750"
    counted = [{**LOGS, "lite_orpo/refused_steps": count} for count in (0, 2)]
    assert short_figures(counted[0]) == short_figures(LOGS)
    assert short_figures(counted[1]) == short_figures(LOGS) + " · steps refused 2"


def test_without_a_terminal_each_log_line_is_printed():
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream, width=100))
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(5), None, logs=LOGS)
    progress.on_log(None, state(5), None, logs={f"eval_{k}": v for k, v in LOGS.items()})
    progress.on_train_end(None, state(10), None)
    assert "step 5/10: loss 1.500 · margin 0.250 · accuracy 0.750" in stream.getvalue()
    assert "held-out at step 5: loss 1.500" in stream.getvalue()


def test_on_a_terminal_the_bar_carries_the_figures():
    stream = io.StringIO()
    progress = TrainingProgress(Console(file=stream, width=140, force_terminal=True))
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(5), None, logs=LOGS)
    progress.on_step_end(None, state(5), None)
    progress.on_train_end(None, state(5), None)
    assert "margin 0.250" in stream.getvalue()
    assert "5/10" in stream.getvalue()


def test_the_card_holds_what_is_known_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    write_card(
        path,
        base_model="base",
        data="pairs.jsonl",
        settings={"learning rate": 1e-3, "epochs": None},
        before={},
        after={"eval_rewards/accuracies": 0.9, "eval_loss": 1.0},
        has_adapter=True,
    )
    text = path.read_text()
    assert "None" not in text
    assert "| reward accuracy | not measured | 0.900 |" in text
    assert "arXiv:2403.07691" in text
    assert json.dumps("epochs") not in text
