"""Which files of a folder are a split: `train.jsonl`, the shards of a hub snapshot, and the like.

Layouts known, the folder itself and its sub-folders `data`, `default` and the configuration's:

    train.jsonl                               one file
    train-00000-of-00002.parquet, ...         all shards of one set, in their order
    train/0000.parquet, ...                   all files of a folder named after the split

Endings may be in capitals; hidden files are passed over.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import DataError

FILES_NAMED = 6


class SplitMissing(DataError):
    """A folder or data set that has no such split (which nobody may have asked for)."""


def files_of_split(
    folder: Path, split: str, endings: Sequence[str], config_name: str | None = None
) -> list[Path]:
    """Find the files that are a split.

    Args:
        folder: the folder that the user named.
        split: such as "train".
        endings: of the files that can be read, such as ".jsonl".
        config_name: a configuration, which is a sub-folder.

    Returns:
        One file, or all of one set's, in their order.

    Raises:
        SplitMissing: there is none; the message names what is there.
        DataError: there are two candidates, or a shard is missing.
    """
    inner = [config_name] if config_name else ["", "data", "default"]
    places = [folder / name for name in inner]
    if config_name:
        places.append(folder / "data" / config_name)
    candidates = [files for place in places for files in _candidates(place, split, endings)]
    if not candidates:
        raise SplitMissing(
            f"{folder}: the folder has no {split}.jsonl, no {split}-00000-of-....parquet or the "
            f"like; {_what_is_there(folder, endings)}"
        )
    if len(candidates) > 1:
        names = " and ".join(str(files[0].relative_to(folder)) for files in candidates[:3])
        raise DataError(f"{folder}: {names} could both be {split!r}; name one of them")
    return candidates[0]


def _candidates(place: Path, split: str, endings: Sequence[str]) -> Iterator[list[Path]]:
    files, inner = _visible_files(place), _visible_files(place / split)
    for ending in endings:
        for path in files:
            if path.name.startswith(split) and path.name[len(split) :].lower() == ending:
                yield [path]
        shards = _shards(place, split, ending)
        if shards:
            yield shards
        inside = [path for path in inner if path.name.lower().endswith(ending)]
        if inside:
            yield inside


def _visible_files(folder: Path) -> list[Path]:
    """Files in their order, without the hidden ones, which systems put beside those copied."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()
    )


def _shards(place: Path, split: str, ending: str) -> list[Path]:
    pattern = re.compile(
        rf"{re.escape(split)}-(\d+)-of-(\d+)(?:-[0-9a-f]+)?(?i:{re.escape(ending)})", re.ASCII
    )
    found: dict[int, Path] = {}
    totals = set()
    for path in sorted(place.glob("*-of-*")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        number, total = int(match[1]), int(match[2])
        if number in found:
            raise DataError(f"{path}: shard {number} is there twice ({found[number].name})")
        found[number] = path
        totals.add(total)
    if len(totals) > 1:
        raise DataError(f"{place}: the shards of {split!r} belong to sets of different sizes")
    if totals:
        total = totals.pop()
        missing = sorted(set(range(min(total, max(found) + 2))) - set(found))
        if missing or len(found) != total:
            number = missing[0] if missing else max(found)
            raise DataError(
                f"{place}: {len(found)} of the {total} shards of {split!r} are there, shard "
                f"{number} is not; copy them all"
            )
    return [found[number] for number in sorted(found)]


def _what_is_there(folder: Path, endings: Sequence[str]) -> str:
    files = sorted(
        str(path.relative_to(folder))
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.name.lower().endswith(tuple(endings)) and not path.name.startswith(".")
    )
    if not files:
        return f"no file in it ends in {', '.join(endings)}"
    more = ", ..." if len(files) > FILES_NAMED else ""
    return f"found {', '.join(files[:FILES_NAMED])}{more}; name a file or another split"
