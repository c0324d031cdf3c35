"""Where documents come from: the standard library's own sources, files, the Hugging Face Hub, or made up."""

import glob
import os
import random
import string
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...conf.schema import ConfigError, SourceConfig, choose
from .documents import MAX_PIECES, Bad, DataError, Document, Piece, Source, ranges
from .files import SUFFIXES, read_file
from .hub import HubSource

PIECE_BYTES = 4_000_000  # small files share a piece of about this size
PIECE_DOCUMENTS = 500
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def make_source(name: str, config: SourceConfig, cache_dir: Path) -> Source:
    """The source that `data.sources.<name>` describes."""
    if config.kind == "stdlib":
        return StdlibSource(name, config)
    if config.kind == "files":
        return FilesSource(name, config)
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

    def __init__(self, name: str, config: SourceConfig):
        self.name, self._config = name, config
        self._sizes = {str(path): path.stat().st_size for path in self._find()}

    def _find(self) -> list[Path]:
        found: set[Path] = set()
        for pattern in self._config.paths:
            expanded = os.path.expanduser(pattern)
            folder = os.path.isdir(expanded)
            matches = glob.glob(os.path.join(expanded, "**", "*") if folder else expanded, recursive=True)
            files = [Path(m).resolve() for m in matches if os.path.isfile(m) and (not folder or m.endswith(SUFFIXES))]
            if not files:
                raise DataError(f"data source {self.name}: no file matches {pattern!r} (looked from {os.getcwd()}); "
                                f"set data.sources.{self.name}.paths")  # fmt: skip
            for file in files:
                if not file.name.endswith(SUFFIXES):
                    raise DataError(f"data source {self.name}: {file} is none of {', '.join(SUFFIXES)}; "
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
        documents = (document for file in piece.files for document in read_file(file, c.sample_by, c.column))
        return _limited(documents, c.max_documents)


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

    def __init__(self, name: str, config: SourceConfig):
        self.name, self._config = name, config
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
        documents = (document for file in piece.files for document in read_file(str(self._root / file), "document", ""))
        return _limited(documents, self._config.max_documents)


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
