"""Documents of one file: .txt, .jsonl (either may be .gz) and .parquet, a little at a time whatever the file says its size is.

Nothing but text is taken. `datasets` would read these files, too, and follow what a parquet file's metadata says of its columns: an image
"column" is decoded from any path or address that a row names. It reads a line and a packed file whole, besides.
"""

import gzip
import io
import json
import os
from collections.abc import Iterator
from typing import TextIO

import pyarrow.parquet

from .documents import HOPELESS, MAX_DOCUMENT_LENGTH, Bad, DataError, Document, decode, explained, take_column

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_CHUNK = 1 << 20  # characters read at a time
_ROWS = 64  # of a parquet file, likewise
_MOST_UNPACKED = 200  # times the packed size; text has 3 to 30, and gzip ends at 1030
_FREE = 64 << 20  # bytes that are unpacked in any case


def read_file(file: str, sample_by: str, column: str) -> Iterator[Document | Bad]:
    """Its documents: a .txt by `sample_by` (document, line, paragraph), a .jsonl by line, a .parquet by row. Raises DataError where the
    file cannot be read; a document that cannot be used is a `Bad`."""
    with explained(file):
        if file.endswith(".parquet"):
            yield from _read_parquet(file, column)
        elif file.endswith((".jsonl", ".jsonl.gz")):
            for where, line in _samples(file, "line"):
                yield from [line] if isinstance(line, Bad) else _parse_json_line(where, line, column)
        else:
            for where, text in _samples(file, sample_by):
                yield from [text] if isinstance(text, Bad) else decode(where, text)


def _samples(file: str, sample_by: str) -> Iterator[tuple[str, str | Bad]]:
    """(where, raw text) of each sample. Raw text has one character per *byte* (latin-1), so that bad bytes spoil one sample only. Line
    ends become "\\n", as in any text file."""
    with _open(file) as text:
        if sample_by == "document":
            whole = text.read(MAX_DOCUMENT_LENGTH + 1)
            yield file, whole if len(whole) <= MAX_DOCUMENT_LENGTH else _too_long(file)
            return
        count = 0
        for part in _split(text, "\n" if sample_by == "line" else "\n\n"):
            if part or sample_by == "line":
                count += 1
                where = f"{file}:{sample_by} {count}"
                yield where, _too_long(where) if part is None else part


def _split(text: TextIO, end: str) -> Iterator[str | None]:
    """What stands between the `end`s; None for what is longer than a document may be, of which no more is held than that."""
    rest, over = "", False
    while chunk := text.read(_CHUNK):
        *parts, rest = (rest + chunk).split(end)
        for part in parts:
            yield None if over or len(part) > MAX_DOCUMENT_LENGTH else part
            over = False
        if len(rest) > MAX_DOCUMENT_LENGTH:
            rest, over = rest[-1:], True  # which may be half an end
    if rest or over:
        yield None if over else rest


def _too_long(where: str) -> Bad:
    return Bad(where=where, why=f"over {MAX_DOCUMENT_LENGTH:,} bytes in one document: split it (sample_by)")


def _open(file: str) -> TextIO:
    stream = _Unpacked(file) if file.endswith(".gz") else open(file, "rb")  # noqa: SIM115 closed with the text
    return io.TextIOWrapper(io.BufferedReader(stream, _CHUNK) if isinstance(stream, _Unpacked) else stream, encoding="latin-1")


class _Unpacked(io.RawIOBase):
    """The bytes of a .gz. Raises DataError where they are so many more than those of the file that this is no text."""

    def __init__(self, file: str):
        self._file, self._most, self._given = file, _FREE + _MOST_UNPACKED * os.stat(file).st_size, 0
        self._stream = gzip.open(file)  # noqa: SIM115 closed with this

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._stream.readinto(buffer)
        self._given += count
        if self._given > self._most:
            raise DataError(f"cannot read {self._file}: it unpacks to over {_MOST_UNPACKED} times its size, as no text does; leave it out, "
                            "or unpack it yourself")  # fmt: skip
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _parse_json_line(where: str, raw: str, column: str) -> Iterator[Document | Bad]:
    for line in decode(where, raw):
        if isinstance(line, Bad):
            yield line
            continue
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            yield Bad(where=where, why=f"not JSON: {error}")
            continue
        yield from take_column(where, record, column)


def _read_parquet(file: str, column: str) -> Iterator[Document | Bad]:
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            rows = range(min(table.metadata.num_rows, HOPELESS))  # a number that the file gives, and nothing has to be there for it
            batches = [[None] * len(rows)] if rows else []
        else:
            batches = (batch.column(0).to_pylist() for batch in table.iter_batches(_ROWS, columns=[column]))
        row = 0
        for batch in batches:
            for value in batch:
                row += 1
                yield from take_column(f"{file}:row {row}", {column: value} if column in names else dict.fromkeys(names), column)
