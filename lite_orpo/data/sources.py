"""Where raw rows come from: local files, folders, the hub, or objects in memory.

A source only reads; every row carries the place it came from. JSON lines are read by the
standard library, since a user needs the number of the line that is wrong; other formats and
hub names go through `datasets`, which is imported when it is first needed.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, HubError

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLE_SUFFIXES = {".csv": "csv", ".parquet": "parquet"}


class LocatedRow(NamedTuple):
    """A raw row and its place in the source, such as "line 3"."""

    place: str
    row: Any


class RowSource(NamedTuple):
    """A named source of rows that can be read any number of times."""

    name: str
    read: Callable[[], Iterable[LocatedRow]]
    size: int | None
    """Number of rows, where it is known without reading."""


def open_source(name: str, *, split: str, config_name: str | None = None) -> RowSource:
    """Find a data set by the name a user gives.

    Args:
        name: a path (.jsonl[.gz], .json, .csv, .parquet, a folder with `<split>.jsonl`), or a
            name on the hub.
        split: the split of a folder or hub data set.
        config_name: the configuration of a hub data set.

    Returns:
        The source; a local file is not read yet.

    Raises:
        DataError: a local file does not exist or has an unknown ending.
        HubError: the name is no local path and the hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _file_source(path)
    if path.is_dir():
        for suffix in (*JSON_LINES_SUFFIXES, ".json", *TABLE_SUFFIXES):
            if (path / f"{split}{suffix}").is_file():
                return _file_source(path / f"{split}{suffix}")
        raise DataError(f"{name}: the folder has no {split}.jsonl, {split}.csv or {split}.parquet")
    if _looks_like_path(name):
        raise DataError(f"{name}: no such file or folder")
    return _hub_source(name, config_name, split)


def dataset_source(name: str, dataset: Any) -> RowSource:
    """Wrap an in-memory or `datasets` data set given to the trainer in Python.

    Args:
        name: what to call it in messages, such as "train_dataset".
        dataset: a `datasets.Dataset`, a list of mappings, or any map-style data set.

    Raises:
        DataError: it is a dictionary of splits or cannot be counted.
    """
    if isinstance(dataset, dict):
        splits = ", ".join(repr(str(split)) for split in dataset)
        raise DataError(f"{name} is a dictionary of splits ({splits}); pass one of them")
    if isinstance(dataset, str):
        raise DataError(
            f"{name} is the text {dataset!r}; pass the rows, such as "
            "datasets.load_dataset('json', data_files=...)['train']"
        )
    if hasattr(dataset, "iloc"):
        raise DataError(f"{name} is a data frame; pass datasets.Dataset.from_pandas(...) of it")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is a {type(dataset).__name__} without a length; "
            "pass a map-style data set or a list of rows"
        )

    def read() -> Iterator[LocatedRow]:
        for index in range(len(dataset)):
            yield LocatedRow(f"row {index}", dataset[index])

    return RowSource(name, read, len(dataset))


def _file_source(path: Path) -> RowSource:
    name = str(path)
    if name.endswith(JSON_LINES_SUFFIXES):
        return RowSource(name, lambda: _read_json_lines(path), None)
    if path.suffix == ".json":
        return RowSource(name, lambda: _read_json(path), None)
    if path.suffix in TABLE_SUFFIXES:
        return _table_source(path)
    endings = ", ".join((*JSON_LINES_SUFFIXES[:2], ".json", *TABLE_SUFFIXES))
    raise DataError(f"{name}: unknown ending {path.suffix!r}; known are {endings}")


def _read_json_lines(path: Path) -> Iterator[LocatedRow]:
    for number, line in enumerate(_text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object_without_repeats)
            yield LocatedRow(f"line {number}", row)
        except _RepeatedKey as error:
            raise DataError(f"{path} line {number}: key {error} stands there twice") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "mend or delete the line"
            ) from None
        except RecursionError:
            raise DataError(f"{path} line {number}: nested too deeply to be a row") from None


class _RepeatedKey(Exception):
    pass


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(repr(next(key for key in keys if keys.count(key) > 1)))
    return row


def _text_lines(path: Path) -> Iterator[str]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        # Bytes, decoded line by line: a decoder that reads ahead cannot say which line is wrong.
        with opener(path, "rb") as stream:
            for line in stream:
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number}: byte {error.object[error.start]:#04x} is not UTF-8; "
            "save the file as UTF-8"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} after line {number}: the compressed file is damaged or cut off ({error}); "
            "copy it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> Iterator[LocatedRow]:
    text = "".join(_text_lines(path))
    if _is_one_object(text):
        raise DataError(
            f"{path}: the file is one JSON object; expected a list of rows, or one row a line"
        )
    if text.lstrip()[:1] != "[":
        # Many files called .json hold JSON lines.
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend the file") from None
    for index, row in enumerate(rows):
        yield LocatedRow(f"entry {index}", row)


def _is_one_object(text: str) -> bool:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(value, dict) and "chosen" not in value


def _table_source(path: Path) -> RowSource:
    import datasets

    try:
        table = datasets.load_dataset(
            TABLE_SUFFIXES[path.suffix], data_files=str(path), split="train"
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {cause}") from None
    return dataset_source(str(path), table)


def _hub_source(name: str, config_name: str | None, split: str) -> RowSource:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        table = datasets.load_dataset(name, config_name, split=split)
    except (
        ConnectionError,
        FileNotFoundError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise HubError(
            f"data set {name!r} is no local file, and the hub did not give it ({_first(error)}); "
            "check the name and the network, or give a local path"
        ) from None
    except ValueError as error:
        raise DataError(f"data set {name!r}: {_first(error)}") from None
    return dataset_source(f"{name} [{split}]", table)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _looks_like_path(name: str) -> bool:
    has_ending = name.endswith((*JSON_LINES_SUFFIXES, ".json", ".json.gz", *TABLE_SUFFIXES))
    return has_ending or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
