"""The progress bar of a run: loss, margin and accuracy beside the steps.

On a terminal it is a live bar; elsewhere (a log file, CI) each log line becomes one printed line.
"""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from ..step.guard import REFUSED_STEPS

_SHOWN = (("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"))


def short_figures(logs: dict[str, Any], prefix: str = "") -> str:
    """Return "loss 1.234 · margin 0.056 · accuracy 0.91", of those that are there.

    Where steps were refused, their number follows.
    """
    parts = [
        f"{label} {float(logs[prefix + key]):.3f}" for key, label in _SHOWN if prefix + key in logs
    ]
    if not prefix and logs.get(REFUSED_STEPS):
        parts.append(f"steps refused {logs[REFUSED_STEPS]}")
    return " · ".join(parts)


class TrainingProgress(TrainerCallback):
    """Show training and evaluation as they go.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True, compact=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._bar.start()
            self._training = self._bar.add_task(
                "Training", total=state.max_steps, completed=state.global_step, figures=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar by one optimiser step."""
        if self._training is not None:
            self._bar.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Move the evaluation bar by one batch."""
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        if self._evaluation is None:
            self._bar.start()
            self._evaluation = self._bar.add_task(
                "Evaluating", total=len(eval_dataloader), figures=""
            )
        self._bar.advance(self._evaluation)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Close the evaluation bar."""
        if self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None
        if self._training is None:
            self._bar.stop()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if not state.is_world_process_zero or not logs:
            return
        for prefix, label in (("", "step"), ("eval_", "held-out at step")):
            figures = short_figures(logs, prefix)
            if prefix + "loss" not in logs or not figures:
                continue
            if prefix == "" and self._training is not None:
                self._bar.update(self._training, figures=figures)
            if not self._console.is_terminal and state.global_step > 0:
                total = f"/{state.max_steps}" if prefix == "" else ""
                self._console.print(f"  {label} {state.global_step}{total}: {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()
        self._training = None
