"""Where documents come from: the standard library's own sources, files, the Hugging Face Hub, or made up."""

import contextlib
import glob
import gzip
import json
import os
import random
import shutil
import string
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ...conf.schema import ConfigError, SourceConfig, choose
from .documents import MAX_PIECES, Bad, DataError, Document, Piece, Source, decode, explained, ranges, take_column
from .hub import HubSource, load_dataset

PIECE_BYTES = 4_000_000  # small files share a piece of about this size
PIECE_DOCUMENTS = 500
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def make_source(name: str, config: SourceConfig, cache_dir: Path) -> Source:
    """The source that `data.sources.<name>` describes."""
    if config.kind == "stdlib":
        return StdlibSource(name, config, cache_dir)
    if config.kind == "files":
        return FilesSource(name, config, cache_dir)
    if config.kind == "hf":
        return HubSource(name, config, cache_dir)
    return SyntheticSource(name, config)


def check(name: str, config: SourceConfig) -> None:
    """The rules of one source that need no look at any file. Raises ConfigError."""
    field = f"data.sources.{name}"
    choose(f"{field}.kind", config.kind, ("stdlib", "files", "hf", "synthetic"))
    choose(f"{field}.sample_by", config.sample_by, ("document", "line", "paragraph"))
    if config.max_documents < 0:
        raise ConfigError(f"{field}.max_documents", config.max_documents, "must not be negative (0 is all)", 0)
    if config.kind == "files" and not config.paths:
        raise ConfigError(f"{field}.paths", "[]", "a source of kind files needs folders or globs of .txt, .jsonl or .parquet")
    if config.kind == "hf" and not config.dataset:
        raise ConfigError(f"{field}.dataset", "''", "a source of kind hf needs the name of a data set on the Hub, or a folder")
    if config.kind == "synthetic" and config.num_documents < 1:
        raise ConfigError(f"{field}.num_documents", config.num_documents, "must be positive", 1000)


# ---------------------------------------------------------------- files


class FilesSource:
    """Files named by globs. A .txt is read by `sample_by`, a .jsonl by line, a .parquet by row; .gz is read as it is."""

    def __init__(self, name: str, config: SourceConfig, cache_dir: Path):
        self.name, self._config, self._cache_dir = name, config, cache_dir
        self._sizes = {str(path): path.stat().st_size for path in self._find()}

    def _find(self) -> list[Path]:
        found: set[Path] = set()
        for pattern in self._config.paths:
            expanded = os.path.expanduser(pattern)
            folder = os.path.isdir(expanded)
            matches = glob.glob(os.path.join(expanded, "**", "*") if folder else expanded, recursive=True)
            files = [Path(m).resolve() for m in matches if os.path.isfile(m) and (not folder or m.endswith(_SUFFIXES))]
            if not files:
                raise DataError(f"data source {self.name}: no file matches {pattern!r} (looked from {os.getcwd()}); "
                                f"set data.sources.{self.name}.paths")  # fmt: skip
            for file in files:
                if not file.name.endswith(_SUFFIXES):
                    raise DataError(f"data source {self.name}: {file} is none of {', '.join(_SUFFIXES)}; "
                                    f"convert it or narrow data.sources.{self.name}.paths")  # fmt: skip
            found.update(files)
        return sorted(found)

    def identity(self) -> dict[str, Any]:
        files = [[path, size, os.stat(path).st_mtime_ns] for path, size in self._sizes.items()]
        c = self._config
        return {"kind": "files", "files": files, "column": c.column, "sample_by": c.sample_by, "max_documents": c.max_documents}

    def pieces(self) -> list[Piece]:
        return _group_files(self._sizes, limited=self._config.max_documents > 0)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        c = self._config
        documents, others = [], []
        for file in piece.files:
            whole = c.sample_by == "document" and file.endswith((".txt", ".txt.gz"))
            (documents if whole else others).append(file)
        yield from _limited(_read_all(documents, others, c, self._cache_dir), c.max_documents)


def _read_all(documents: list[str], others: list[str], c: SourceConfig, cache_dir: Path) -> Iterator[Document | Bad]:
    yield from _read_whole_files(documents, cache_dir)
    for file in others:
        if file.endswith(".parquet"):
            yield from _read_parquet(file, c.column)
        elif file.endswith((".jsonl", ".jsonl.gz")):
            for where, raw in _read_raw([file], "line", cache_dir):
                yield from _parse_json_line(where, raw, c.column)
        else:
            for where, raw in _read_raw([file], c.sample_by, cache_dir):
                yield from decode(where, raw)


def _read_whole_files(files: list[str], cache_dir: Path) -> Iterator[Document | Bad]:
    for where, raw in _read_raw(files, "document", cache_dir):
        yield from decode(where, raw)


def _read_raw(files: list[str], sample_by: str, cache_dir: Path) -> Iterator[tuple[str, str]]:
    """(where, raw text) of each sample. Raw text has one character per *byte* (latin-1), so that bad bytes spoil one sample only.

    `datasets` would otherwise give up on the whole file. Line ends become "\\n", as in any text file.
    """
    if not files:
        return
    span = files[0] if len(files) == 1 else f"one of {files[0]} … {files[-1]}"
    with explained(span), _unpacked(files, cache_dir) as plain:
        escaped = [glob.escape(file) for file in plain]  # `datasets` takes every name for a pattern
        rows = load_dataset("text", data_files=escaped, split="train", streaming=True, sample_by=sample_by, encoding="latin-1")
        if sample_by == "document":
            yield from ((file, row["text"]) for file, row in zip(files, rows, strict=True))
        else:
            yield from ((f"{files[0]}:{sample_by} {i}", row["text"]) for i, row in enumerate(rows, 1))


@contextlib.contextmanager
def _unpacked(files: list[str], cache_dir: Path) -> Iterator[list[str]]:
    """The files with each .gz unpacked beside the cache meanwhile: `datasets` ignores the encoding of a packed file."""
    if not any(file.endswith(".gz") for file in files):
        yield list(files)
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=cache_dir) as folder:
        plain = []
        for i, file in enumerate(files):
            if file.endswith(".gz"):
                plain.append(os.path.join(folder, f"{i:06d}.txt"))
                with explained(file), gzip.open(file) as source, open(plain[-1], "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            else:
                plain.append(file)
        yield plain


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
    with explained(file):
        columns = pyarrow.parquet.read_schema(file).names
        only = [column] if column in columns else None
        rows = load_dataset("parquet", data_files=[glob.escape(file)], split="train", streaming=True, columns=only)
        for i, row in enumerate(rows):
            yield from take_column(f"{file}:row {i + 1}", row, column)


def _group_files(sizes: dict[str, int], limited: bool) -> list[Piece]:
    """Neighbouring files together, up to a piece's size. A source with a limit of documents is one piece: the limit counts over all."""
    target = sys.maxsize if limited else max(PIECE_BYTES, sum(sizes.values()) // MAX_PIECES)
    groups: list[list[str]] = []
    room = 0
    for file, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = target
        groups[-1].append(file)
        room -= size
    return [Piece(files=tuple(group)) for group in groups]


def _limited(documents: Iterator[Document | Bad], limit: int) -> Iterator[Document | Bad]:
    for i, document in enumerate(documents):
        if limit and i == limit:
            return
        yield document


# ---------------------------------------------------------------- the standard library


class StdlibSource:
    """The .py files of the Python that runs this, without its tests and installed packages: text that needs no download."""

    def __init__(self, name: str, config: SourceConfig, cache_dir: Path):
        self.name, self._config, self._cache_dir = name, config, cache_dir
        self._root = Path(sysconfig.get_path("stdlib") or os.path.dirname(os.__file__))
        self._sizes = {str(path.relative_to(self._root)): path.stat().st_size for path in self._find()}

    def _find(self) -> list[Path]:
        found = []
        for folder, names, files in os.walk(self._root):
            names[:] = [n for n in names if n not in _SKIPPED_FOLDERS and not n.startswith(".")]
            found += [Path(folder, f) for f in files if f.endswith(".py")]
        if not found:
            raise DataError(f"data source {self.name}: no .py file under {self._root}: Python is here without its sources; use data=files")
        return sorted(found)

    def identity(self) -> dict[str, Any]:
        # No times and no absolute path: nodes with the same Python share a cache.
        return {"kind": "stdlib", "python": sys.version, "files": list(self._sizes.items()), "max_documents": self._config.max_documents}

    def pieces(self) -> list[Piece]:
        return _group_files(self._sizes, limited=self._config.max_documents > 0)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        files = [str(self._root / file) for file in piece.files]
        return _limited(_read_whole_files(files, self._cache_dir), self._config.max_documents)


# ---------------------------------------------------------------- made up


class SyntheticSource:
    """Documents from a small random Markov grammar: each word has four successors, so a model learns to about 2 bits a word."""

    def __init__(self, name: str, config: SourceConfig):
        self.name, self._num_documents = name, config.num_documents
        if config.max_documents:
            self._num_documents = min(config.num_documents, config.max_documents)
        rng = random.Random("grammar")
        words = sorted({"".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(200)})
        self._successors = {word: rng.sample(words, 4) for word in words}
        self._words = words

    def identity(self) -> dict[str, Any]:
        return {"kind": "synthetic", "num_documents": self._num_documents, "grammar": 1}

    def pieces(self) -> list[Piece]:
        return ranges(self._num_documents, max(PIECE_DOCUMENTS, self._num_documents // MAX_PIECES))

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        for i in range(piece.start, piece.stop):
            rng = random.Random(f"document {i}")
            word = rng.choice(self._words)
            text = [f"{i}:"]  # no two documents are the same, so the held-out share is what was asked for
            for _ in range(rng.randint(50, 200)):
                text.append(word)
                word = rng.choice(self._successors[word])
            yield Document(text=" ".join(text), where=f"{self.name} document {i}")
