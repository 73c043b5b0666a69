"""What is saved is fit to be shared, and is not written over what somebody else put there."""

import json
import re
from pathlib import Path

from ..errors import CheckpointError
from ..public_names import public_name
from .fingerprint import FINGERPRINT_FILE
from .manifest import MANIFEST_FILE

ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
_WEIGHTS = ("adapter_model", "model", "pytorch_model")
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_STATES = re.compile(
    r"(optimizer|scheduler|scaler|random_\d+|trainer_state|manifest|fingerprint)\..*"
)
_SHARED_ENDINGS = {".safetensors", ".json", ".jinja", ".model", ".txt"}


def make_public(folder: Path, adapters: list[str]) -> None:
    """Take the base model's local path out of what PEFT wrote into a folder.

    In `adapter_config.json` a relative path stays, an absolute one keeps its last part. The model
    card does not name a local base: its `base_model` is for names on the hub.

    Args:
        folder: where a model or adapter was just saved.
        adapters: names of the model's adapters; all but "default" have folders of their own.
    """
    for path in (folder / ADAPTER_CONFIG, *(folder / name / ADAPTER_CONFIG for name in adapters)):
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            base = config.get("base_model_name_or_path")
            if isinstance(base, str) and public_name(base) != base:
                config["base_model_name_or_path"] = public_name(base)
                path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if (folder / CARD).is_file():
        _make_card_public(folder / CARD)


def _make_card_public(path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    base = card.data.base_model
    if not isinstance(base, str) or not (Path(base).exists() or public_name(base) != base):
        return
    card.data.base_model = None
    tags = card.data.tags or []
    card.data.tags = [tag for tag in tags if not tag.startswith("base_model:")]
    if public_name(base) != base:
        card.text = card.text.replace(base, public_name(base))
    card.save(path)


def refuse_base_folder(folder: Path, base: str | None) -> None:
    """Refuse to save into the folder that the base model was loaded from.

    Args:
        folder: where something is about to be saved.
        base: name or folder of the base model.

    Raises:
        CheckpointError: it is the same folder.
    """
    if base and folder.exists() and folder.resolve() == Path(base).resolve():
        raise CheckpointError(
            f"output_dir: {folder} is the base model's own folder and would be overwritten; name "
            "another"
        )


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder for a new run that holds another program's weights or checkpoints.

    Ours are known by their fingerprint, checkpoints by their manifest.

    Raises:
        CheckpointError: see above; nothing has been written.
    """
    if not folder.is_dir():
        return
    weights = [f"{name}{ending}" for name in _WEIGHTS for ending in _WEIGHT_ENDINGS]
    found = [name for name in weights if (folder / name).exists()]
    if (folder / FINGERPRINT_FILE).is_file():
        found = []
    found += [
        path.name
        for path in sorted(folder.iterdir())
        if _CHECKPOINT.fullmatch(path.name) and not (path / MANIFEST_FILE).is_file()
    ]
    if found:
        more = ", ..." if len(found) > 3 else ""
        raise CheckpointError(
            f"output_dir: {folder} holds {', '.join(found[:3])}{more}, which lite-orpo did not "
            "write and would overwrite; name another folder, or move that away"
        )


def refuse_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint with a pickle in it, which no run of ours writes.

    Raises:
        CheckpointError: names the file.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"):
            raise CheckpointError(
                f"{checkpoint} holds {path.name}, a pickle, which can run code and which lite-orpo "
                "never writes; go on from another checkpoint"
            )


def files_to_share(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that make the model, without the training's states."""
    return [
        path
        for path in sorted(checkpoint.iterdir())
        if path.is_file()
        and path.suffix in _SHARED_ENDINGS
        and path.name != CARD
        and not _STATES.fullmatch(path.name)
    ]
