"""metrics.jsonl: every log line of a run as one JSON object, flushed as it is written."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class MetricsFile(TrainerCallback):
    """Write each log line to a file.

    Args:
        path: where to; its folder is created.
        append: go on with an existing file (a resumed run) instead of starting it anew.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.write_text("", encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one line, on the main process only."""
        if not state.is_world_process_zero or not logs:
            return
        line = json.dumps({"step": state.global_step, **logs})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file, oldest first."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]
