"""One source, tokenised once, as files that any number of processes may build and read together.

A source's folder holds, for piece p, `p.train.bin` and `p.eval.bin` (token ids, little-endian, documents end to end, each followed by
the end-of-document id), `p.bad.jsonl` where documents were unusable, and last `p.json`: a piece without it is not finished.
Every file appears by `os.replace`, and equal inputs give equal bytes, so the locks only save work: nothing is wrong without them.
"""

import collections
import contextlib
import enum
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...conf import files
from ..metrics import BAD_LINE, from_plain
from . import fim
from .documents import MAX_DOCUMENT_LENGTH, Bad, DataError, Document, Piece, Source, read_hopefully
from .patience import PAUSES_S, patiently
from .tokenizer import Tokenizer, canonical_hash, write_atomically

FORMAT = 2  # part of every key: raise it when the bytes change
_BATCH_BYTES = 250_000


@dataclass(frozen=True, kw_only=True)
class PieceRecord:
    """What a finished piece holds."""

    documents: int
    bad: int
    train_tokens: int
    eval_tokens: int
    sha256: str  # of the train tokens' bytes, then the eval tokens'


def held_out(text: str, eval_fraction: float) -> bool:
    """Whether a document is for evaluation: a hash of its text decides, so copies of it are never on both sides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


class SourceCache:
    """The tokens of one source under one tokenizer, held-out share and rate of filling in the middle (which needs `tokenizer.fim_ids`)."""

    def __init__(
        self, source: Source, pieces: list[Piece], tokenizer: Tokenizer, *, cache_dir: Path, eval_fraction: float, fim_rate: float
    ):
        self.source, self.pieces = source, pieces
        self._tokenizer, self._eval_fraction, self._fim_rate = tokenizer, eval_fraction, fim_rate
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        key = [FORMAT, source.identity(), [p.to_json() for p in pieces], tokenizer.fingerprint, eval_fraction]
        key += [fim_rate] if fim_rate else []  # caches from before there was one keep their names
        self.folder = cache_dir / "tokens" / f"{source.name}-{canonical_hash(key)[:20]}"

    def path(self, piece: int, what: str) -> Path:
        return self.folder / f"{piece:05d}.{what}"

    def record(self, piece: int) -> PieceRecord | None:
        """Of a finished piece; None where it is not finished, or its files have not the length that they should."""
        try:
            record = from_plain(PieceRecord, json.loads(self.path(piece, "json").read_bytes()))
            sizes = [os.stat(self.path(piece, f"{split}.bin")).st_size for split in ("train", "eval")]
        except (OSError, *BAD_LINE):
            return None
        return record if sizes == [n * self.dtype.itemsize for n in (record.train_tokens, record.eval_tokens)] else None

    def build(self, *, workers: int, log: Callable[[str], None], shard: int = 0, num_shards: int = 1) -> None:
        """Finish every `num_shards`-th piece from `shard` on. Processes that call this together share the work and all wait for its end."""
        todo = [p for p in range(shard, len(self.pieces), num_shards) if self.record(p) is None]
        if not todo:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        log(f"data source {self.source.name}: {len(todo)} of {len(self.pieces)} pieces to tokenise, into {self.folder}")
        with ThreadPoolExecutor(workers) as pool:
            for wait in (False, True):  # first the pieces that nobody is at, then those whose owner may have died
                for p in todo:
                    if self.record(p) is None:
                        with locked(self.path(p, "lock"), wait=wait, log=log) as claim:
                            if claim is not Claim.TAKEN and self.record(p) is None:
                                if claim is Claim.MINE:
                                    self._remove_leftovers(p)
                                what = f"data source {self.source.name}, piece {p + 1}"
                                patiently(lambda p=p: self._build_piece(p, pool, workers, log), what)

    def _remove_leftovers(self, p: int) -> None:
        """Temporary files of a builder that died here."""
        for leftover in self.folder.glob(f"{p:05d}.*.tmp"):
            leftover.unlink(missing_ok=True)

    def _build_piece(self, p: int, pool: Executor, workers: int, log: Callable[[str], None]) -> None:
        start, tag = time.monotonic(), f"{os.uname().nodename}-{os.getpid()}.tmp"
        names = ("train.bin", "eval.bin", "bad.jsonl")
        temporary = [self.path(p, f"{name}.{tag}") for name in names]
        with contextlib.ExitStack() as stack:
            record = self._write(p, [stack.enter_context(files.fresh(path)) for path in temporary], pool, workers)
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, self.path(p, name)) if record.bad or name != "bad.jsonl" else path.unlink()
        write_atomically(self.path(p, "json"), json.dumps(asdict(record)))
        seconds = time.monotonic() - start
        log(f"data source {self.source.name}: piece {p + 1} of {len(self.pieces)}: {record.documents:,} documents, "
            f"{record.train_tokens + record.eval_tokens:,} tokens in {seconds:.1f} s")  # fmt: skip

    def _write(self, p: int, outputs, pool: Executor, workers: int) -> PieceRecord:
        """Tokenise a piece into three open files."""
        documents = bad = 0
        lengths, hashes = [0, 0], [hashlib.sha256(), hashlib.sha256()]
        for batch in _ahead(pool, self._encode, _batches(read_hopefully(self.source, self.pieces[p])), 2 * workers):
            for i, data in enumerate((batch.train, batch.eval)):
                outputs[i].write(data)
                hashes[i].update(data)
                lengths[i] += len(data) // self.dtype.itemsize
            outputs[2].writelines(json.dumps(asdict(b)).encode() + b"\n" for b in batch.bad)
            documents, bad = documents + batch.documents, bad + len(batch.bad)
        return PieceRecord(documents=documents, bad=bad, train_tokens=lengths[0], eval_tokens=lengths[1],
                           sha256=hashlib.sha256(hashes[0].digest() + hashes[1].digest()).hexdigest())  # fmt: skip

    def _encode(self, batch: list[Document | Bad]) -> "_Encoded":
        documents = [d for d in batch if isinstance(d, Document) and len(d.text) <= MAX_DOCUMENT_LENGTH]
        bad = [d for d in batch if isinstance(d, Bad)]
        bad += [Bad(where=d.where, why=f"{len(d.text):,} characters in one document, over {MAX_DOCUMENT_LENGTH:,}: split it (sample_by)")
                for d in batch if isinstance(d, Document) and len(d.text) > MAX_DOCUMENT_LENGTH]  # fmt: skip
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for document in documents:
            held = held_out(document.text, self._eval_fraction)
            ids = self._ids(document.text, 0.0 if held else self._fim_rate)
            if ids.max() >= self._tokenizer.vocab_size:
                bad.append(Bad(where=document.where, why=f"token id {ids.max()} is outside the vocabulary of {self._tokenizer.vocab_size}"))
                continue
            parts[held].append(ids.astype(self.dtype).tobytes())
        return _Encoded(train=b"".join(parts[0]), eval=b"".join(parts[1]), documents=len(parts[0]) + len(parts[1]), bad=bad)

    def _ids(self, text: str, fim_rate: float) -> np.ndarray:
        """Of a whole document, its end included."""
        cut, end = fim.cut(text, fim_rate) if fim_rate else None, [self._tokenizer.eod_id]
        if cut is None:
            return np.concatenate([*self._tokenizer.encode_documents([text]), end])
        prefix, middle, suffix = self._tokenizer.encode_documents(cut)
        before_prefix, before_suffix, before_middle = self._tokenizer.fim_ids
        return np.concatenate([[before_prefix], prefix, [before_suffix], suffix, [before_middle], middle, end])


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    train: bytes
    eval: bytes
    documents: int
    bad: list[Bad]


class TokenStream:
    """The tokens of one split of a source, all pieces end to end, as if they were one array."""

    def __init__(self, cache: SourceCache, split: str, lengths: list[int]):
        self._dtype = cache.dtype
        self._files = [cache.path(p, f"{split}.bin") for p, n in enumerate(lengths) if n]
        self._ends = np.cumsum([n for n in lengths if n], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._files else 0

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill the int64 array `out` with the tokens from `start` on. Raises DataError where a file cannot be read, after some tries."""
        p, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        offset = start - (int(self._ends[p - 1]) if p else 0)
        while filled < len(out):
            held = int(self._ends[p]) - (int(self._ends[p - 1]) if p else 0)
            part = self._read(self._files[p], offset, min(held - offset, len(out) - filled))
            out[filled : filled + len(part)] = part
            filled, p, offset = filled + len(part), p + 1, 0

    def _read(self, path: Path, offset: int, count: int) -> np.ndarray:
        """Not mapped into memory: there a disk that fails ends the process, here it is an error."""
        size = self._dtype.itemsize

        def once() -> bytes:
            with open(path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), count * size, offset * size)

        try:
            data = patiently(once, str(path), again=lambda error: isinstance(error, OSError))  # whatever an absent file system answers
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}; {len(PAUSES_S) + 1} tries in {sum(PAUSES_S):g} s. "
                            "Is its file system there? The run goes on from its checkpoint when it is") from error  # fmt: skip
        if len(data) != count * size:
            raise DataError(
                f"{path} was cut: it ends before token {offset + count}; delete {path.parent} and run again, it will be rebuilt"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def file_of(self, token: int) -> Path:
        return self._files[int(np.searchsorted(self._ends, token, side="right"))]


class Claim(enum.Enum):
    """What asking for a lock gave."""

    MINE = enum.auto()
    TAKEN = enum.auto()  # another process has it
    NO_LOCKS = enum.auto()  # the file system has none: go on, others may do the same work


@contextlib.contextmanager
def locked(path: Path, *, wait: bool, log: Callable[[str], None]) -> Iterator[Claim]:
    """Hold the lock file; with `wait`, never TAKEN. The kernel drops a lock with its owner, so a dead builder holds up nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.opened(path, "wb") as file:
        claim = _try_lock(file)
        if claim is Claim.TAKEN and wait:
            log(f"waiting for another process that builds {path.with_suffix('')}")
            while (claim := _try_lock(file)) is Claim.TAKEN:
                time.sleep(0.1)
        yield claim


def _try_lock(file) -> Claim:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Claim.TAKEN
    except OSError:
        return Claim.NO_LOCKS
    return Claim.MINE


def _batches(documents: Iterable[Document | Bad]) -> Iterator[list[Document | Bad]]:
    batch: list[Document | Bad] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) if isinstance(document, Document) else 1000
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _ahead(pool: Executor, function: Callable, items: Iterable, window: int) -> Iterator:
    """`map` on a pool that reads no more than `window` items ahead, so that memory stays bounded."""
    pending: collections.deque = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
