"""Reading a text file that a stranger made: bounded memory, and errors that name the line.

A `.gz` is unpacked on the way. What is in the lines is not looked at here; the bounds are
far above what preference data needs and far below what a machine notices.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ...errors import DataError

MAX_LINE_BYTES = 16 * 2**20
# Text packs 3 to 10 times, the same row over and over some 200 times; a bomb 1,000 times.
MAX_PACKED_RATIO = 250
UNPACKED_WITHOUT_QUESTION = 16 * 2**20

_PIECE_BYTES = 2**16

# Beginnings of files whose names promise text, and what the user should do.
_NO_TEXT = (
    (b"\x1f\x8b", "is a gzip archive; let its name end in .gz"),
    (b"PAR1", "is a parquet file; let its name end in .parquet"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; run `git lfs pull`"),
    (b"<!DOCTYPE", "is a web page, not the data; download the file itself"),
    (b"<html", "is a web page, not the data; download the file itself"),
)


def refuse_what_is_no_text(path: Path, beginning: bytes) -> None:
    """Name a file that is plainly something else than its ending says.

    Raises:
        DataError: the beginning belongs to an archive, a web page, a Git LFS pointer or the like.
    """
    for signature, text in _NO_TEXT:
        if beginning.startswith(signature):
            raise DataError(f"{path}: the file {text}")


class NumberedLine(NamedTuple):
    """A line and its number from 1; `text` is None where the line is over `MAX_LINE_BYTES`."""

    number: int
    text: str | None


class BoundedFile:
    """A file of text, unpacked if it is a `.gz`; every failure is a DataError with the line.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be opened or read, is damaged, or unpacks to absurdly much.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = 0
        self._unpacked = 0
        try:
            self._raw: io.BufferedReader = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._is_packed = path.suffix == ".gz"
        self._stream: Any = gzip.GzipFile(fileobj=self._raw) if self._is_packed else self._raw

    def __enter__(self) -> "BoundedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._raw.close()

    def lines(self) -> Iterator[NumberedLine]:
        """The lines, decoded one by one, so that the one that is no UTF-8 can be named.

        Raises:
            DataError: as of the class, and for a byte that is no UTF-8.
        """
        while data := self._read(lambda: self._stream.readline(MAX_LINE_BYTES + 1)):
            self._line += 1
            if len(data) > MAX_LINE_BYTES:
                while data and not data.endswith(b"\n"):
                    data = self._read(lambda: self._stream.readline(MAX_LINE_BYTES))
                yield NumberedLine(self._line, None)
                continue
            try:
                yield NumberedLine(
                    self._line, data.decode("utf-8-sig" if self._line == 1 else "utf-8")
                )
            except UnicodeDecodeError as error:
                raise self._not_utf8(self._line, data[error.start]) from None

    def pieces(self) -> Iterator[str]:
        """The text in pieces of no particular length, for what is not made of lines.

        Raises:
            DataError: as `lines`.
        """
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        data = b"\n"
        while data:
            data = self._read(lambda: self._stream.read(_PIECE_BYTES))
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line = self._line + 1 + error.object.count(b"\n", 0, error.start)
                raise self._not_utf8(line, error.object[error.start]) from None
            self._line += text.count("\n")
            yield text

    def _not_utf8(self, line: int, byte: int) -> DataError:
        return DataError(
            f"{self._path} line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8"
        )

    def _read(self, read: Callable[[], bytes]) -> bytes:
        try:
            data = read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self._path} after line {self._line}: the compressed file is damaged or cut off "
                f"({error}); copy it again"
            ) from None
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror or error}") from None
        if not self._unpacked:
            refuse_what_is_no_text(self._path, data)
        self._unpacked += len(data)
        if self._is_packed and self._unpacked > UNPACKED_WITHOUT_QUESTION:
            packed = self._raw.tell()
            if self._unpacked > MAX_PACKED_RATIO * packed:
                raise DataError(
                    f"{self._path} after line {self._line}: {packed:,} packed bytes became "
                    f"{self._unpacked:,}, which no text does; if you trust the file, unpack it "
                    "and give its plain name"
                )
        return data
