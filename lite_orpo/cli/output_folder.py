"""The output folder of a run: whether it may be written, and what an earlier run left in it.

A run's folder is known by its resolved configuration, a checkpoint by its manifest. What no run
wrote is never removed and never overwritten, not even with `overwrite_output_dir`.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint.find import newest_complete
from ..checkpoint.fingerprint import FINGERPRINT_FILE
from ..checkpoint.manifest import MANIFEST_FILE, why_incomplete
from ..checkpoint.staging import put_back
from ..checkpoint.writing import writing
from ..config.run_config import RunConfig
from ..config.yaml_file import read_settings, write_settings
from ..errors import ConfigError

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CONFIG_FILE = "config.resolved.yaml"
SETTINGS_COMMENT = """\
Written by lite-orpo: the settings of this run. `lite-orpo train` reads them again.
Of absolute paths only the last part is here, as ./name: give those keys anew to repeat the run."""

_TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.jinja vocab.json vocab.txt merges.txt tokenizer.model spiece.model"
).split()
_ANY_RUN = {
    CONFIG_FILE, METRICS_FILE, "metrics.partial", CURVES_FILE, FINGERPRINT_FILE, "README.md",
    "trainer_state.json", "eval.json", "eval.png", *_TOKENIZER,
}  # fmt: skip
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.safetensors")
_MODEL = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_REFERENCE = re.compile(r"reference_logps-[0-9a-f]+\.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-\d+(\.superseded(-\d+)?)?")
_STAGED = re.compile(r"\.checkpoint-\d+\.(partial|replaced)")
# Where people send what a run prints.
_LOGS = (".log", ".out", ".err")


def check_writable(config: RunConfig) -> None:
    """Refuse a folder that cannot be written, or is the base model's own.

    Raises:
        ConfigError: see above.
    """
    folder = Path(str(config.training.output_dir))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"output_dir: {folder} is a link to nowhere; name a folder")
    if folder.exists() and folder.resolve() == Path(str(config.model.model_name_or_path)).resolve():
        raise ConfigError(f"output_dir: {folder} is the base model's own folder; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written: {error.strerror}") from None


def check_output_dir(config: RunConfig, path: Path) -> None:
    """Refuse a folder that holds something else, or lacks what is resumed.

    Hidden files and logs may be there, and the configuration itself.

    Args:
        config: the run's.
        path: the configuration's file.

    Raises:
        ConfigError: see above; nothing has been written or removed then.
    """
    if config.training.process_index != 0:
        return  # only one rank looks: another may find what the first has just begun to write
    folder = Path(str(config.training.output_dir))
    resume = config.training.resume_from_checkpoint
    if resume:
        _check_checkpoint(resume, folder)
        if resume is True or Path(str(resume)).resolve().parent == folder.resolve():
            return
    own = own_files(folder)
    others = [
        entry
        for entry in sorted(folder.iterdir())
        if entry not in own
        and not entry.name.startswith(".")
        and entry.suffix not in _LOGS
        and entry.resolve() != path.resolve()
    ]
    if config.report.overwrite_output_dir:
        uses_peft = config.lora.use_peft
        clashing = [entry for entry in others if _is_written(entry.name, uses_peft=uses_peft)]
        if clashing:
            raise ConfigError(
                f"output_dir: {folder} holds {_names(clashing)}, which no run of lite-orpo wrote "
                "there and this one would overwrite; choose another folder, or move that away"
            )
    elif own:
        has_checkpoint = newest_complete(folder).checkpoint is not None
        advice = "go on with it by --resume, " if has_checkpoint else ""
        raise ConfigError(
            f"output_dir: {folder} holds an earlier run ({own[0].name}); choose another folder, "
            f"{advice}or set overwrite_output_dir=true"
        )
    elif others:
        raise ConfigError(
            f"output_dir: {folder} holds something else ({_names(others)}); choose another folder, "
            "or set overwrite_output_dir=true, which leaves what no run wrote as it is"
        )


def own_files(folder: Path) -> list[Path]:
    """What runs wrote into a folder, the configuration by which it is known for theirs last.

    Args:
        folder: an output folder; may be anything.
    """
    is_run = (folder / CONFIG_FILE).is_file()
    uses_peft = not is_run or _used_peft(folder / CONFIG_FILE)
    own = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            is_checkpoint = (path / MANIFEST_FILE).is_file() and _CHECKPOINT.fullmatch(path.name)
            is_own = bool(is_checkpoint or _STAGED.fullmatch(path.name))
        else:
            is_own = is_run and _is_written(path.name, uses_peft=uses_peft)
        if is_own:
            own.append(path)
    return sorted(own, key=lambda path: (path.name == CONFIG_FILE, path.name))


def _used_peft(resolved: Path) -> bool:
    try:
        setting = read_settings(resolved).get("use_peft")
    except ConfigError:
        return True
    return setting is None or setting.value is not False


def _is_written(name: str, *, uses_peft: bool) -> bool:
    """Whether a run writes something of this name."""
    weights = _ADAPTER if uses_peft else _MODEL
    patterns = (weights, _CHECKPOINT, _REFERENCE)
    return name in _ANY_RUN or any(pattern.fullmatch(name) for pattern in patterns)


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


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


class SettingsFile(TrainerCallback):
    """The settings of a run in its folder; of one that goes on, once nothing refuses that.

    Args:
        path: where to.
        config: the run's.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._path, self._config = path, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write them: the checkpoint fits the run."""
        self.write()

    def write(self) -> None:
        """Write them now.

        Raises:
            CheckpointError: the file cannot be written; an earlier one is as it was.
        """
        with writing(str(self._path), "nothing has been trained yet"):
            write_settings(self._path, self._config.as_settings(), SETTINGS_COMMENT)


def remove_earlier_run(folder: Path) -> None:
    """Remove what earlier runs wrote, so that no file of it is taken for the new run's.

    Call it only with the user's consent (`overwrite_output_dir`), and once the new run has its
    data and model.
    """
    for path in own_files(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
