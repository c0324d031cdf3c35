"""Data sets of the Hugging Face Hub, or local copies of them, whole or streamed.

The Hub is asked for once, when the work is divided: the commit found then is kept, so nodes that build later, or days after,
read the same documents; and nodes without a network train from a finished cache.

`datasets` brings pandas, which takes seconds to import: only where a run has such a source.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...conf.schema import SourceConfig
from .documents import MAX_PIECES, Bad, DataError, Document, Piece, explained, first_line, ranges, take_column

HUB_TIMEOUT_S = 10.0
_PIECE_DOCUMENTS = 2000
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def load_dataset(*args, **kwargs) -> Any:
    """`datasets.load_dataset` without progress bars: ranks would draw them over each other."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)  # nosec B615  # callers name the commit, or files that are here
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


class HubSource:
    """A data set by name or folder (also one written by `save_to_disk`). Streaming reads no more than it uses."""

    def __init__(self, name: str, config: SourceConfig, cache_dir: Path):
        self.name, self._config, self._cache_dir = name, config, cache_dir
        folder = Path(config.dataset).expanduser()
        self._folder = folder.resolve() if folder.is_dir() else None
        self._loaded: Any = None

    def identity(self) -> dict[str, Any]:
        c = self._config
        found = sorted(p for p in self._folder.rglob("*") if p.is_file()) if self._folder else []
        files = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in found]
        return {"kind": "hf", "dataset": c.dataset, "files": files, "subset": c.subset, "split": c.split, "revision": c.revision,
                "column": c.column, "streaming": c.streaming, "max_documents": c.max_documents}  # fmt: skip

    def pieces(self) -> list[Piece]:
        """Ranges of rows, or of a stream's shards. A limited stream is one piece: its end is known only by reading."""
        c = self._config
        revision = "" if self._folder else self._ask_hub()
        rows = self._load(revision)
        if rows.column_names is not None and c.column not in rows.column_names:
            raise DataError(f"data source {self.name}: {c.dataset} has no column {c.column!r}; it has {', '.join(rows.column_names)}; "
                            f"set data.sources.{self.name}.column")  # fmt: skip
        self._check_column(rows)
        if not c.streaming:
            total = min(rows.num_rows, c.max_documents or rows.num_rows)
            return ranges(total, max(_PIECE_DOCUMENTS, total // MAX_PIECES), revision)
        shards = rows.num_shards
        return ranges(shards, shards if c.max_documents else max(1, shards // MAX_PIECES), revision)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        rows, c = self._load(piece.revision), self._config
        if c.streaming:
            parts = [rows.shard(rows.num_shards, i) for i in range(piece.start, piece.stop)]
            limit, first = c.max_documents, piece.start
        else:
            parts, limit, first = [rows.select(range(piece.start, piece.stop))], 0, 0
        count = 0
        with explained(c.dataset):
            for shard, part in enumerate(parts, first):
                for i, row in enumerate(part):
                    if limit and count == limit:
                        return
                    where = f"{c.dataset} {c.split} " + (f"shard {shard} row {i}" if c.streaming else f"row {piece.start + i}")
                    yield from take_column(where, row, c.column)
                    count += 1

    def _check_column(self, rows: Any) -> None:
        """Text, or bytes of it: `datasets` opens what an image's or a sound's row names, any file or address."""
        c = self._config
        kind = "string" if rows.features is None else str(getattr(rows.features.get(c.column), "dtype", "no text"))
        if kind not in _TEXT:
            raise DataError(f"data source {self.name}: column {c.column!r} of {c.dataset} holds {kind}, and must hold text; "
                            f"set data.sources.{self.name}.column")  # fmt: skip

    def _ask_hub(self) -> str:
        """The commit that the revision names now. One short question, before `datasets` asks with many retries."""
        import huggingface_hub
        from huggingface_hub import errors

        c = self._config
        try:
            return huggingface_hub.HfApi().dataset_info(c.dataset, revision=c.revision or None, timeout=HUB_TIMEOUT_S).sha or ""
        except errors.OfflineModeIsEnabled:
            return c.revision  # the user's own wish: `datasets` reads its cache or says that it has none
        except errors.GatedRepoError:
            raise self._error("is gated: accept its terms on the Hub and log in with `hf auth login`") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise self._error("is neither on the Hub nor a folder here; check name and revision, or log in if it is private") from None
        except Exception as error:
            raise self._error(f"cannot be reached on the Hub ({first_line(error)}); build the cache where there is a network "
                              "(`shoestring data build`), point to a local folder, or use data=stdlib") from None  # fmt: skip

    def _load(self, revision: str) -> Any:
        """The data set, opened once."""
        if self._loaded is None:
            import datasets

            c = self._config
            try:
                if self._folder and ((self._folder / "state.json").exists() or (self._folder / "dataset_dict.json").exists()):
                    _check_saved(self._folder)
                    saved = datasets.load_from_disk(str(self._folder))
                    rows = saved[c.split] if isinstance(saved, datasets.DatasetDict) else saved
                    self._loaded = rows.to_iterable_dataset() if c.streaming else rows
                else:
                    if self._folder:
                        _check_inside(self._folder, datasets.load_dataset_builder(str(self._folder), c.subset or None))
                    self._loaded = load_dataset(
                        str(self._folder or c.dataset), c.subset or None, split=c.split, streaming=c.streaming, revision=revision or None,
                        cache_dir=str(self._cache_dir / "datasets"),
                    )  # fmt: skip
            except Exception as error:
                raise self._error(f"cannot be opened: {first_line(error)}") from error
        return self._loaded

    def _error(self, what: str) -> DataError:
        c = self._config
        return DataError(f"data source {self.name}: {c.dataset}{f' ({c.subset})' if c.subset else ''}, split {c.split}, {what}; "
                         f"see data.sources.{self.name}")  # fmt: skip


def _check_inside(folder: Path, builder: Any) -> None:
    """A folder's own README may name files of anywhere, an address too: ValueError for one that is not in the folder."""
    for paths in (builder.config.data_files or {}).values():
        for path in paths:
            if not Path(os.path.normpath(path)).is_relative_to(folder):
                raise ValueError(f"it names {path}, which is not in its folder")


def _check_saved(folder: Path) -> None:
    """Likewise, of what `save_to_disk` has written."""
    for path in (folder / "dataset_dict.json", *folder.glob("**/state.json")):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        names = [*content.get("splits", []), *(file["filename"] for file in content.get("_data_files", []))]
        for name in names:
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(f"{path.name} names {name!r}, which is not in its folder")
