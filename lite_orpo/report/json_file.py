"""A JSON file of figures: beside its place and renamed, or not at all."""

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file.

    Raises:
        ConfigError: it cannot be written.
        ValueError: a figure is not finite.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
