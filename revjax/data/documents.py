"""Files -> documents. What a file holds is told by its name:

    .jsonl .ndjson     a document for each line, in the field `text_field`
    .parquet .arrow    a document for each row, in the column `text_field`      (needs pyarrow)
    anything else      one document, if it is UTF-8 text without NULs

A long document comes in pieces, so that memory does not grow with it.
"""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from ..errors import DataError, nearest
from ..logging import get_logger
from .files import DAMAGE, kind, unpacked

PIECE = 2**20  # characters


class Piece(NamedTuple):
    """Some text of a document."""

    text: str
    is_last: bool  # of its document
    trained: tuple[tuple[int, int], ...] | None = None  # the characters that are to be learned; None is all


class Documents:
    """The documents of the files `paths`, in pieces, for one iteration.

    Left out are files and rows that are not text, and documents without any (see `tell_left_out`). Raises `DataError`
    for a file that cannot be read, and for a row without `text_field`.
    """

    nothing = "documents without text"  # what is left out as empty

    def __init__(self, paths: list[pathlib.Path], text_field: str):
        self.paths, self.text_field = paths, text_field
        self.bytes_read = 0  # of the files, as they are on disk
        self.not_text: list[str] = []  # names of files and rows
        self.empty = 0

    def __iter__(self) -> Iterator[Piece]:
        before = 0
        for path in self.paths:
            read = {".jsonl": self._lines, ".ndjson": self._lines, ".parquet": self._parquet, ".arrow": self._arrow}
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    for piece in read.get(kind(path), self._whole)(path, file):
                        self.bytes_read = before + file.tell()
                        yield piece
                before += size
            except DAMAGE as e:
                raise _damaged(path, e) from None
            except OSError as e:
                if e.errno is None:  # of bz2 and pyarrow, for what is in the file
                    raise _damaged(path, e) from None
                raise DataError(f"Cannot read {path}: {e.strerror}. Check it, or narrow data.source.") from None
        self.bytes_read = before

    def tell_left_out(self) -> None:
        """Logs what was not given."""
        if self.not_text:
            message = "left out %d files or rows that are not UTF-8 text, such as %s"
            get_logger(__name__).warning(message, len(self.not_text), self.not_text[0])
        if self.empty:
            get_logger(__name__).info("left out %d %s", self.empty, self.nothing)

    def _whole(self, path: pathlib.Path, file: IO[bytes]) -> Iterator[Piece]:
        """The file as one document. It is read twice: where it is not text, nothing of it may be given."""
        try:
            with path.open("rb") as first, unpacked(path, first) as text:
                is_text = all("\0" not in chunk for chunk in _chunks(text))
        except UnicodeDecodeError:
            is_text = False
        if is_text:
            with unpacked(path, file) as text:
                yield from self._pieces(text)
        else:
            self.not_text.append(str(path))

    def _lines(self, path: pathlib.Path, file: IO[bytes]) -> Iterator[Piece]:
        with _utf8_or_error(path), unpacked(path, file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise DataError(f"{path}:{number} is not JSON: {e}.") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number} must be an object with a {self.text_field!r}: {row!r:.80}")
                if self.text_field not in row:
                    raise self._no_field(f"{path}:{number}", list(row))
                yield from self._row(row[self.text_field], f"{path}:{number}")

    def _parquet(self, path: pathlib.Path, file: IO[bytes]) -> Iterator[Piece]:
        parquet = _pyarrow(path).parquet
        with _arrow_errors(path):
            table = parquet.ParquetFile(file)
            self._check_column(path, table.schema_arrow)
            yield from self._column(path, table.iter_batches(batch_size=256, columns=[self.text_field]))

    def _arrow(self, path: pathlib.Path, file: IO[bytes]) -> Iterator[Piece]:
        pyarrow = _pyarrow(path)
        with _arrow_errors(path):
            table = pyarrow.ipc.open_stream(file)
            self._check_column(path, table.schema)
            yield from self._column(path, table)

    def _check_column(self, path: pathlib.Path, schema: Any) -> None:
        if self.text_field not in schema.names:
            raise self._no_field(str(path), schema.names)
        self._check_type(path, schema.field(self.text_field).type)

    def _check_type(self, path: pathlib.Path, column: Any) -> None:
        types = _pyarrow(path).types
        if not (types.is_string(column) or types.is_large_string(column)):
            raise DataError(f"{path}: the column {self.text_field!r} must hold text, but holds {column}.")

    def _column(self, path: pathlib.Path, batches: Any) -> Iterator[Piece]:
        number = 0
        for batch in batches:
            for text in batch.column(self.text_field).to_pylist():
                yield from self._row(text, f"{path}, row {number}")
                number += 1

    def _row(self, text: Any, name: str) -> Iterator[Piece]:
        if text is not None and not isinstance(text, str):
            raise DataError(f"{name}: the field {self.text_field!r} must be a text, but is {text!r:.80}.")
        if not text or self._can_be_text(text, name):
            yield from self._pieces(io.StringIO(text, newline=""))

    def _can_be_text(self, text: str, name: str) -> bool:
        if not _is_text(text):
            self.not_text.append(name)
            return False
        return True

    def _pieces(self, text: io.TextIOBase) -> Iterator[Piece]:
        held = ""
        for chunk in _chunks(text):
            if held:
                yield Piece(held, False)
            held = chunk
        if held:
            yield Piece(held, True)
        else:
            self.empty += 1

    def _no_field(self, where: str, fields: list[str]) -> DataError:
        hint = nearest(self.text_field, fields) or f" Set --data.text_field={fields[0] if fields else 'NAME'}."
        return DataError(
            f"{where} has no field {self.text_field!r} (data.text_field), "
            f"but {', '.join(fields) or 'none at all'}.{hint}"
        )


def _chunks(text: io.TextIOBase) -> Iterator[str]:
    """About `PIECE` characters at a time, up to the end of a line where one comes soon."""
    while chunk := text.read(PIECE):
        yield chunk + text.readline(PIECE)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")  # JSON may hold halves of surrogate pairs
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _damaged(path: pathlib.Path, e: BaseException) -> DataError:
    return DataError(f"{path} is damaged: {e}. Fetch it again, or narrow data.source.")


@contextlib.contextmanager
def _utf8_or_error(path: pathlib.Path):
    try:
        yield
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8: {e}.") from None


def _pyarrow(path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet and datasets need pyarrow. Type: pip install pyarrow") from None
    return pyarrow


@contextlib.contextmanager
def _arrow_errors(path: pathlib.Path):
    try:
        yield
    except _pyarrow(path).ArrowInvalid as e:
        raise _damaged(path, e) from None
