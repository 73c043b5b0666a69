"""`lite-orpo init`: write a commented configuration."""

from pathlib import Path

from ..config.template import TEMPLATE
from ..errors import ConfigError


def write_template(path: Path, *, force: bool) -> None:
    """Write the template to `path`.

    Raises:
        ConfigError: the file exists and `force` is false, or it cannot be written.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; name another file, or use --force")
    try:
        path.write_text(TEMPLATE.format(name=path.name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"wrote {path}; set model_name_or_path and dataset_name in it, then run")
    print(f"  lite-orpo train {path}")
