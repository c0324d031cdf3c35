"""What a source of documents gives: documents and bad documents, in pieces; and how raw bytes and records become either.

A source divides itself into pieces, each read on its own by any process on any node. The division depends on the documents only,
never on who reads, so the order of documents is the same however the work is shared.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ...conf import secrets

MAX_PIECES = 1024  # of one source, about: larger corpora get larger pieces
MAX_DOCUMENT_LENGTH = 64_000_000  # characters; of a file that is still to be decoded, bytes
_LONGEST, _MOST = 40, 12  # characters of a column's name, and columns, that a message shows
HOPELESS = 1000  # so many documents, and not one usable: stop rather than read terabytes to the same end


class DataError(RuntimeError):
    """The data cannot be used: what is wrong, where, and what to do next."""


class DamagedSample(DataError):
    """What was read for a sample is no sample; others may be sound."""


@dataclass(frozen=True, kw_only=True)
class Document:
    text: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A document that cannot be used."""

    where: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a source: some whole files, or documents (for a streamed data set: shards) from `start` to before `stop`."""

    files: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    revision: str = ""  # hf: the commit that was current when the work was divided

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "files": list(self.files)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Piece":
        return cls(**{**value, "files": tuple(value["files"])})


class Source(Protocol):
    name: str

    def identity(self) -> dict[str, Any]:
        """JSON of all that decides its documents, as far as it is known without a network."""
        ...

    def pieces(self) -> list[Piece]:
        """The division of the source, in order. Raises DataError where it cannot be reached or holds nothing."""
        ...

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The documents of a piece, always in the same order. Raises DataError where a file cannot be read."""
        ...


def decode(where: str, raw: str) -> Iterator[Document | Bad]:
    try:
        text = raw.encode("latin-1").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Bad(where=where, why=f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8")
        return
    yield from accept(where, text)


def take_column(where: str, record: Any, column: str) -> Iterator[Document | Bad]:
    if not isinstance(record, dict):
        yield Bad(where=where, why=f"a {type(record).__name__}, not an object with a column {column!r}")
    elif column not in record:
        yield Bad(where=where, why=f"no column {column!r}; it has {_columns(record)}")
    elif isinstance(record[column], bytes):
        yield from decode(where, record[column].decode("latin-1"))
    elif not isinstance(record[column], str):
        yield Bad(where=where, why=f"column {column!r} holds a {type(record[column]).__name__}, not a string")
    else:
        yield from accept(where, record[column])


def _columns(record: dict) -> str:
    """Names of columns. What is none by its looks may be text of the document, which no message quotes."""
    names = [str(name) for name in record]
    shown = [name for name in names if len(name) <= _LONGEST and re.fullmatch(r"[A-Za-z_][\w .-]*", name)][:_MOST]
    rest = len(names) - len(shown)
    return secrets.SHAPED.hide(", ".join(shown) + (f"{' and ' * bool(shown)}{rest} more" if rest else "")) or "none"


def accept(where: str, text: str) -> Iterator[Document | Bad]:
    """The document, unless it is blank (nothing to learn, nothing wrong) or cannot be written as UTF-8."""
    if not text.strip():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield Bad(where=where, why=f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}")
        return
    yield Document(text=text, where=where)


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Whatever the libraries raise while reading becomes one sentence about the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {where}: {first_line(error)}; repair the file or leave it out") from error


def read_hopefully(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    """The documents of a piece. Raises DataError where it begins with a thousand bad ones: a wrong column, most likely."""
    bad = 0
    for document in source.read(piece):
        if isinstance(document, Document):
            bad = -1
        elif bad >= 0:
            bad += 1
            if bad == HOPELESS:
                raise DataError(f"data source {source.name}: {bad} documents in a row are unusable, and none was good before; the last: "
                                f"{document.where}: {document.why}; correct data.sources.{source.name}")  # fmt: skip
        yield document


def ranges(total: int, size: int, revision: str = "") -> list[Piece]:
    return [Piece(start=i, stop=min(i + size, total), revision=revision) for i in range(0, total, size)]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
