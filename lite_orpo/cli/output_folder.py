"""The output folder of a run: whether it may be written, and what an earlier run left in it."""

import shutil
from pathlib import Path

from ..checkpoint.find import newest_complete
from ..checkpoint.manifest import why_incomplete
from ..checkpoint.staging import put_back
from ..config.run_config import RunConfig
from ..errors import ConfigError

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CONFIG_FILE = "config.resolved.yaml"
_WEIGHTS = ("adapter_model.safetensors", "model*.safetensors", "checkpoint-*", ".checkpoint-*")
# Everything by which an earlier run could be mistaken for a part of the new one.
_PRODUCTS = (
    *_WEIGHTS,
    "adapter_config.json",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "trainer_state.json",
    METRICS_FILE,
    CURVES_FILE,
    CONFIG_FILE,
)


def check_output_dir(config: RunConfig) -> None:
    """Refuse a folder that cannot be written, holds another run, or lacks what is resumed.

    Raises:
        ConfigError: see above; nothing has been written or removed then.
    """
    if config.training.process_index != 0:
        return  # only one rank looks: another may find what the first has just begun to write
    folder = Path(str(config.training.output_dir))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    if folder.exists() and folder.resolve() == Path(str(config.model.model_name_or_path)).resolve():
        raise ConfigError(f"output_dir: {folder} is the base model's own folder; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    resume = config.training.resume_from_checkpoint
    if resume:
        _check_checkpoint(resume, folder)
        if resume is True or Path(str(resume)).resolve().parent == folder.resolve():
            return
    if config.report.overwrite_output_dir:
        return
    found = [path.name for mark in (*_WEIGHTS, METRICS_FILE) for path in folder.glob(mark)]
    if found:
        has_checkpoint = newest_complete(folder).checkpoint is not None
        advice = "go on with it by --resume, " if has_checkpoint else ""
        raise ConfigError(
            f"output_dir: {folder} holds an earlier run ({found[0]}); choose another folder, "
            f"{advice}or set overwrite_output_dir=true"
        )


def _check_checkpoint(resume: str | bool, folder: Path) -> None:
    if resume is True:
        found = newest_complete(folder)
        if found.checkpoint is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.passed_over)
            holds = f"no complete one ({reasons})" if reasons else "none"
            raise ConfigError(f"--resume needs a checkpoint, but {folder} holds {holds}")
        return
    put_back(Path(str(resume)).parent)
    reason = why_incomplete(Path(str(resume)))
    if reason is not None:
        newest = newest_complete(folder).checkpoint
        known = "" if newest is None else f"; the newest complete one here is {newest}"
        raise ConfigError(
            f"resume_from_checkpoint: {resume} is no complete checkpoint: {reason}{known}"
        )


def remove_earlier_run(folder: Path) -> None:
    """Remove an earlier run's products, so that no file of it is taken for the new run's.

    Call it only with the user's consent (`overwrite_output_dir`), and once the new run has its
    data and model.
    """
    for mark in _PRODUCTS:
        for path in folder.glob(mark):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
