"""The manifest of a checkpoint: its files with sizes and hashes, and whether all of that holds."""

import hashlib
import json
from pathlib import Path

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file of a folder, the manifest itself left out."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _hash(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def why_incomplete(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint; None if it is one.

    Reads every file: what a disk gives back is compared with what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"its manifest has format {manifest['format']!r}, known here is {_FORMAT}"
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}: it was not finished, or not written by lite-orpo"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return f"its {MANIFEST_FILE} is damaged"
    except RecursionError:
        return f"its {MANIFEST_FILE} is damaged"
    if not files:
        return f"its {MANIFEST_FILE} names no files"
    if not _is_inside(folder, MANIFEST_FILE):
        return f"its {MANIFEST_FILE} is a link to a file outside of it"
    for name in files:
        if not _is_inside(folder, name):
            return f"its {MANIFEST_FILE} names {name!r}, which is outside of it"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if _hash(path) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return _stranger(folder, set(files))


def _is_inside(folder: Path, name: str) -> bool:
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # links in a circle, a zero byte
        return False


def _stranger(folder: Path, known: set[str]) -> str | None:
    """A file that was put there later: a library might load it instead of what was written."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = name in known or name == MANIFEST_FILE or path.name.startswith(".")
        if path.is_file() and not is_ours:
            return f"{name} is not in its {MANIFEST_FILE}"
    return None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is not there before Python 3.11
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
