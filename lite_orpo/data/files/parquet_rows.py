"""Rows of parquet files, a few hundred at a time, straight from the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..row_source import LocatedRow
from .bounded_file import refuse_what_is_no_text

BATCH_ROWS = 256
MAX_PACKED_RATIO = 2000
UNPACKED_WITHOUT_QUESTION = 256 * 2**20


def read_parquet(path: Path) -> Iterator[LocatedRow]:
    """The rows in the file's order.

    Raises:
        DataError: the file is damaged or no parquet file, has two columns of one name, or unpacks
            to absurdly much.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    _check_beginning(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_file(path, file)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in _rows_of(batch):
                    yield LocatedRow(f"row {number}", row)
                    number += 1
    except DataError:
        raise
    # Of text that is no UTF-8, pyarrow says a ValueError, of anything else errors of its own.
    except (pa.ArrowException, OSError, ValueError) as error:
        after = f" after row {number - 1}" if number else ""
        raise DataError(
            f"{path}{after}: cannot be read as parquet: {error}; copy or write it again"
        ) from None


class ValueOutOfRange:
    """Stands in for a value that Python has no type for, such as a date after the year 9999."""


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch; a column that cannot be had in Python does not take the others along."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ArithmeticError, ValueError):
        columns = [_values_of(column) for column in batch.columns]
        names = batch.schema.names
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return rows


def _values_of(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ArithmeticError, ValueError):
        return [ValueOutOfRange()] * len(column)
    return values


def count_parquet_rows(path: Path) -> int | None:
    """Number of rows that the file says it has; None where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError, ValueError):
        return None  # said in words when the rows are read


def _check_beginning(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not beginning.startswith(b"PAR1"):
        refuse_what_is_no_text(path, beginning)


def _check_file(path: Path, file: Any) -> None:
    names = list(file.schema_arrow.names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: column {repeated[0][:40]!r} stands there twice")
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.row_group(group).num_columns):
            chunk = metadata.row_group(group).column(column)
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            if unpacked > max(UNPACKED_WITHOUT_QUESTION, MAX_PACKED_RATIO * packed):
                raise DataError(
                    f"{path}: column {chunk.path_in_schema!r}: {packed:,} packed bytes become "
                    f"{unpacked:,}, which no text does"
                )
