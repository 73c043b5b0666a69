"""Names fit to be written into files that get shared: no absolute path of a machine.

What is given as an absolute path keeps its last part, as `./part`: with the dot it cannot be taken
for a name on the hub, from where another model would be fetched in its place.
"""

import os
from pathlib import Path
from typing import Any


def public_name(name: str) -> str:
    """A hub name or a relative path as it is; of an absolute path `./` and its last part."""
    return f"./{Path(name).name}" if os.path.isabs(name) else name


def short_name(name: str) -> str:
    """For people to read: a hub name as it is; of a local path, there or not, its last part."""
    is_local = os.path.isabs(name) or Path(name).expanduser().exists()
    return Path(name).expanduser().resolve().name if is_local else name


def public_values(value: Any) -> Any:
    """The same with every text in it, however deep in lists and mappings, made public."""
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, dict):
        return {key: public_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_values(entry) for entry in value]
    return value
