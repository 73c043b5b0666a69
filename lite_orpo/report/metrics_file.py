"""metrics.jsonl: every log line of a run as one JSON object, flushed as it is written."""

import contextlib
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint.writing import writing

_ADVICE = "checkpoints are as they were: mend that, and go on with --resume"


class MetricsFile(TrainerCallback):
    """Write each log line to a file.

    Args:
        path: where to; its folder is created.
        append: go on with an existing file (a resumed run) instead of starting it anew.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        self._append = append
        self._is_open = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what an interrupted run logged after the checkpoint that is resumed from."""
        if self._append and state.is_world_process_zero and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            # Beside it and renamed: a full disk must not cost what was there.
            beside = self.path.with_suffix(".partial")
            with writing(str(self.path), _ADVICE):
                beside.write_text(text, encoding="utf-8")
                beside.replace(self.path)

    def _open(self) -> None:
        # Not before there is something to write: a run that fails at its data or model must not
        # cost an earlier run its figures.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._append:
            self.path.write_text("", encoding="utf-8")
        self._is_open = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one line, on the main process only."""
        if state.is_world_process_zero and logs:
            self.write(state.global_step, logs)

    def write(self, step: int, content: dict[str, Any]) -> None:
        """Append one line; the caller sees to it that only the main process does.

        Raises:
            CheckpointError: it cannot be written.
        """
        line = json.dumps({"step": step, **content})
        with writing(str(self.path), _ADVICE):
            if not self._is_open:
                self._open()
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file, oldest first; one that a killed process left half is skipped."""
    lines = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines
