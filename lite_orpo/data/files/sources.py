"""Where raw rows come from: local files, folders, the hub, or objects in memory.

A source only reads; every row carries the place it came from. Files are read by `json_rows.py`,
`csv_rows.py` and `parquet_rows.py`; what a row means is decided in `rows.py`. Hub names go through
`datasets`, which is imported when it is first needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError, HubError
from ..row_source import LocatedRow, RowSource, UnreadRow
from .column_mapping import check_column_mapping, with_mapped_columns
from .csv_rows import read_csv
from .folders import SplitMissing, files_of_split
from .json_rows import read_json, read_json_lines
from .parquet_rows import count_parquet_rows, read_parquet

__all__ = [
    "READERS",
    "LocatedRow",
    "RowSource",
    "SplitMissing",
    "UnreadRow",
    "dataset_source",
    "open_source",
]

READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".ndjson": read_json_lines,
    ".ndjson.gz": read_json_lines,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
    ".parquet": read_parquet,
}
"""How a file is read, by the end of its name."""

FOREIGN_FORMATS = ("arrow", "jax", "numpy", "pandas", "polars", "tensorflow", "torch")
"""Of `datasets`' formats, those whose rows are the same rows in other types."""


def open_source(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    column_mapping: Mapping[str, str | None] | None = None,
) -> RowSource:
    """Find a data set by the name a user gives.

    Args:
        name: a file (.jsonl, .ndjson, .json, .csv, .tsv, each also .gz, or .parquet), a folder
            (`<split>.jsonl`, `data/<split>-00000-of-00002.parquet`, what `save_to_disk` wrote), or
            a name on the hub.
        split: the split of a folder or hub data set.
        config_name: the configuration of a hub data set; of a folder, a sub-folder.
        column_mapping: which column is what, see `column_mapping.py`; by default by their names.

    Returns:
        The source; a local file is not read yet.

    Raises:
        DataError: a local file does not exist or has an unknown ending, or the mapping is none.
        SplitMissing: a folder or hub data set without the split (a DataError).
        HubError: the name is no local path and the hub does not have it or cannot be reached.
    """
    mapping = check_column_mapping(column_mapping)
    return with_mapped_columns(_open(name, split, config_name), mapping)


def dataset_source(
    name: str, dataset: Any, column_mapping: Mapping[str, str | None] | None = None
) -> RowSource:
    """Wrap an in-memory or `datasets` data set given to the trainer in Python.

    Args:
        name: what to call it in messages, such as "train_dataset".
        dataset: a `datasets.Dataset`, a list of mappings, any map-style data set; an iterable
            one, such as `datasets.IterableDataset`; or a generator of rows, which can be read
            once. Of a `DatasetDict`, the split "train".
        column_mapping: which column is what, see `column_mapping.py`; by default by their names.

    Raises:
        DataError: it is a dictionary without "train", a data frame, or nothing that has rows.
    """
    mapping = check_column_mapping(column_mapping)
    return with_mapped_columns(_wrap(name, dataset), mapping)


def _open(name: str, split: str, config_name: str | None) -> RowSource:
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home of nobody
        raise DataError(f"{name[:80]!r} is no path that can be looked at: {error}") from None
    if is_file:
        return _file_source(path)
    if is_folder:
        return _folder_source(path, split, config_name)
    if _looks_like_path(name):
        raise DataError(f"{name}: no such file or folder")
    return _hub_source(name, config_name, split)


def _wrap(name: str, dataset: Any) -> RowSource:
    if isinstance(dataset, dict):
        if hasattr(dataset, "column_names") and "train" in dataset:  # a DatasetDict
            return _wrap(f"{name}['train']", dataset["train"])
        refuse_columns(name, dataset)
        splits = ", ".join(repr(str(split)) for split in dataset)
        raise DataError(f"{name} is a dictionary of splits ({splits}); pass one of them")
    if isinstance(dataset, str | bytes):
        raise DataError(
            f"{name} is the text {dataset[:80]!r}; pass the rows, such as "
            "datasets.load_dataset('json', data_files=...)['train']"
        )
    if hasattr(dataset, "iloc"):
        raise DataError(f"{name} is a data frame; pass datasets.Dataset.from_pandas(...) of it")
    dataset = _in_python(dataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows: Callable[[], Iterable[Any]] = lambda: (dataset[i] for i in range(len(dataset)))  # noqa: E731
        return RowSource(name, lambda: _located(rows()), len(dataset))
    if isinstance(dataset, Iterator):
        return RowSource(name, _OnlyOnce(name, dataset).read, None)
    if hasattr(dataset, "__iter__"):
        return RowSource(name, _ReadAnew(name, dataset).read, None)
    raise DataError(
        f"{name} is a {type(dataset).__name__} and has no rows; pass a data set or a list of rows"
    )


def refuse_columns(name: str, dataset: Any) -> None:
    """Refuse a dictionary of columns, which looks like one of splits.

    Raises:
        DataError: the values of the dictionary are no rows; names the remedy.
    """
    firsts = [
        next(iter(values), None) if isinstance(values, (list, tuple)) else None
        for values in dataset.values()
    ]
    is_columns = {"chosen", "rejected"} & set(dataset) or any(isinstance(a, str) for a in firsts)
    if is_columns and not hasattr(dataset, "column_names"):
        columns = ", ".join(repr(str(column)[:40]) for column in [*dataset][:8])
        raise DataError(
            f"{name} is a dictionary of columns ({columns}); pass "
            "datasets.Dataset.from_dict(...) of it, or a list of rows"
        )


def _in_python(dataset: Any) -> Any:
    """A `datasets` data set whose rows are Python's, whatever `with_format` made of them."""
    form = getattr(dataset, "format", None)
    if not isinstance(form, dict) or form.get("type") not in FOREIGN_FORMATS:
        return dataset
    return dataset.with_format(
        None, columns=form["columns"], output_all_columns=form["output_all_columns"]
    )


class _ReadAnew:
    """The rows of what can be iterated again; that it is not what gives the same iterator twice."""

    def __init__(self, name: str, rows: Iterable[Any]) -> None:
        self._name = name
        self._rows = rows
        self._last: Iterator[Any] | None = None

    def read(self) -> Iterator[LocatedRow]:
        rows = iter(self._rows)
        if rows is self._last:
            raise _read_before(self._name)
        self._last = rows
        return _located(rows)


def _read_before(name: str) -> DataError:
    return DataError(
        f"{name} is a generator and has been read; pass a list or a data set where "
        "the rows are needed again"
    )


def _located(rows: Iterable[Any]) -> Iterator[LocatedRow]:
    for index, row in enumerate(rows):
        yield LocatedRow(f"row {index}", row)


class _OnlyOnce:
    """A generator's rows. A second reading would find nothing, and must not look like no rows."""

    def __init__(self, name: str, rows: Iterator[Any]) -> None:
        self._name = name
        self._rows = rows
        self._is_read = False

    def read(self) -> Iterator[LocatedRow]:
        if self._is_read:
            raise _read_before(self._name)
        self._is_read = True
        return _located(self._rows)


def _file_source(path: Path) -> RowSource:
    ending = _ending(path.name)
    if ending is None:
        known = ", ".join(ending for ending in READERS if not ending.endswith(".gz"))
        raise DataError(
            f"{path}: unknown ending {path.suffix!r}; known are {known}, and .gz of those of text"
        )
    read = READERS[ending]
    size = count_parquet_rows(path) if ending == ".parquet" else None
    return RowSource(str(path), lambda: read(path), size)


def _folder_source(folder: Path, split: str, config_name: str | None) -> RowSource:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_source(folder, split)
    files = files_of_split(folder, split, list(READERS), config_name)
    sources = [_file_source(path) for path in files]
    if len(sources) == 1:
        return sources[0]

    def read() -> Iterator[LocatedRow]:
        for path, source in zip(files, sources, strict=True):
            for place, row in source.read():
                yield LocatedRow(f"{path.name} {place}", row)

    sizes = [source.size for source in sources]
    known = [size for size in sizes if size is not None]
    return RowSource(f"{folder} [{split}]", read, sum(known) if len(known) == len(sizes) else None)


def _saved_source(folder: Path, split: str) -> RowSource:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets
    import pyarrow as pa

    try:
        saved = _plain_texts(datasets.load_from_disk(str(folder)))
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ) as error:  # whatever stands in its JSON files
        raise DataError(f"{folder}: cannot be read as a saved data set: {_first(error)}") from None
    if isinstance(saved, dict):
        if split not in saved:
            raise SplitMissing(f"{folder}: no split {split!r}; found {', '.join(saved)}")
        saved = saved[split]
    elif split != "train":
        # One data set without splits is for training.
        raise SplitMissing(f"{folder}: one saved data set without splits, so no {split!r}")
    return _wrap(f"{folder} [{split}]", saved)


def _plain_texts(saved: Any) -> Any:
    """Without a format that its files ask for, and without decoding: a medium can name any file
    or address, which `datasets` would open.
    """
    if isinstance(saved, dict):
        return type(saved)({split: _plain_texts(each) for split, each in saved.items()})
    media = [column for column, feature in saved.features.items() if _is_opened(feature)]
    return saved.with_format(None).remove_columns(media)


def _is_opened(feature: Any) -> bool:
    if isinstance(feature, (dict, list, tuple)):
        parts = feature.values() if isinstance(feature, dict) else feature
        return any(map(_is_opened, parts))
    inner = getattr(feature, "feature", None)
    is_medium = getattr(feature, "decode", False) and type(feature).__name__ != "Json"
    return bool(is_medium) or (inner is not None and _is_opened(inner))


def _hub_source(name: str, config_name: str | None, split: str) -> RowSource:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        table = datasets.load_dataset(name, config_name, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"data set {name!r}: {_first(cause)}") from None
    except (
        ConnectionError,
        FileNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise HubError(
            f"data set {name!r} is no local file, and the hub did not give it ({_first(error)}); "
            "check the name and the network, or give a local path"
        ) from None
    except ValueError as error:
        kind = SplitMissing if "split" in str(error).lower() else DataError
        raise kind(f"data set {name!r}: {_first(error)}") from None
    except RuntimeError as error:  # a data set that is a script, which is not run
        raise DataError(f"data set {name!r}: {_first(error)}") from None
    return _wrap(f"{name} [{split}]", table)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _ending(name: str) -> str | None:
    """The longest known ending, in whatever case it is written."""
    known = [ending for ending in READERS if name.lower().endswith(ending)]
    return max(known, key=len, default=None)


def _looks_like_path(name: str) -> bool:
    has_ending = _ending(name) is not None
    return has_ending or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
