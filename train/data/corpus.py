"""The corpus of a run: weighted sources, tokenised once, packed end to end, and read at any position of one seeded order.

Sample i of a source is its tokens [i*S, i*S + W): documents cross the borders of samples, and the tokens past the first S are those
that the next sample begins with. Which sample is read at which index is computed from (seed, phase, index) alone, so a run resumes at
a number, on any world size. Fewer than S tokens at the end of a source are not used.

n samples   S sequence length   W = S + 1 + extra tokens read per sample (extra: targets of multi-token prediction)
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...conf.schema import ConfigError, DataConfig
from . import sources
from .documents import DamagedSample, DataError, Document, Piece, Source, read_hopefully
from .shuffle import FeistelPermutation, Mixture
from .token_cache import FORMAT, PieceRecord, SourceCache, TokenStream, held_out, locked
from .tokenizer import FIM_TOKENS, MIN_BPE_VOCAB, ByteTokenizer, Tokenizer, canonical_hash, load_tokenizer, train_bpe, write_atomically

__all__ = ["Corpus", "DamagedSample", "DataError", "Position", "SourceSummary", "Tokenizer", "build", "check", "open_corpus"]

_BPE_SAMPLE_PER_ID = 1500  # characters of training text for each id of a BPE: 3 MB for 2048
_BPE_SAMPLE_PIECES = 16  # of each source, evenly spaced, so that the sample is not all of one kind


@dataclass(frozen=True, kw_only=True)
class Position:
    """The next sample of the training stream to be read."""

    phase: int
    index: int


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    name: str
    kind: str
    share: float  # of training samples
    documents: int
    quarantined: int
    train_tokens: int
    train_samples: int  # in one epoch
    eval_samples: int


class Corpus:
    """All samples of a run, by index. Opened by `open_corpus`; reading needs no lock, so each rank has one of its own."""

    def __init__(self, config: DataConfig, caches: list[SourceCache], tokenizer: Tokenizer, *, seed: int, extra: int):
        self.tokenizer = tokenizer
        self._seq_len, self._width, self._seed = config.seq_len, config.seq_len + 1 + extra, seed
        records = [_finished(cache) for cache in caches]
        self._names = [cache.source.name for cache in caches]
        self._train = [TokenStream(c, "train", [r.train_tokens for r in rs]) for c, rs in zip(caches, records)]
        self._eval = [TokenStream(c, "eval", [r.eval_tokens for r in rs]) for c, rs in zip(caches, records)]
        weights = [config.sources[name].weight for name in self._names]
        self._mixture = Mixture(weights)
        shares = [w / sum(weights) for w in weights]
        self.sources = tuple(
            SourceSummary(
                name=name, kind=config.sources[name].kind, share=share,
                documents=sum(r.documents for r in rs), quarantined=sum(r.bad for r in rs),
                train_tokens=train.num_tokens, train_samples=self._num_samples(train), eval_samples=self._num_samples(held),
            )
            for name, share, rs, train, held in zip(self._names, shares, records, self._train, self._eval)
        )  # fmt: skip
        self._eval_ends = np.cumsum([s.eval_samples for s in self.sources])
        self._bytes_of_id = tokenizer.bytes_of_id()
        self.num_train_tokens = sum(s.train_tokens for s in self.sources)
        self.num_eval_samples = int(self._eval_ends[-1])
        self.num_quarantined = sum(s.quarantined for s in self.sources)
        content = [[name, share, [r.sha256 for r in rs]] for name, share, rs in zip(self._names, shares, records)]
        self.fingerprint = canonical_hash([FORMAT, seed, tokenizer.fingerprint, content])

    def train(self, indices: Sequence[int] | np.ndarray, phase: int = 0) -> Tensor:
        """Samples at these indices of the training stream, (n, W) int64: inputs are [:, :S], targets [:, 1 : S + 1].

        An index past the samples of its source reads the next epoch, in another order. Raises IndexError on a negative one.
        """
        which, within = self._mixture(np.atleast_1d(np.asarray(indices, dtype=np.int64)))
        sample = np.empty_like(within)
        for k in np.unique(which):
            rows = np.flatnonzero(which == k)
            epochs, places = np.divmod(within[rows], self.sources[k].train_samples)
            for epoch in np.unique(epochs):
                order = FeistelPermutation(self.sources[k].train_samples, f"{self._seed}/{phase}/{self._names[k]}/{epoch}")
                sample[rows[epochs == epoch]] = order(places[epochs == epoch])
        return self._read(self._train, which, sample)

    def eval(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Held-out samples, (n, W) int64, a source's together and in an order that no seed changes: `eval_plan` has their indices.

        Raises IndexError unless all lie in [0, num_eval_samples).
        """
        indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if not indices.size:
            return torch.empty((0, self._width), dtype=torch.int64)
        if self.num_eval_samples == 0:
            raise IndexError("there are no held-out samples: raise data.eval_fraction, lower data.seq_len or set train.eval_interval=0")
        if indices.min() < 0 or indices.max() >= self.num_eval_samples:
            raise IndexError(f"indices from {indices.min()} to {indices.max()} do not lie in [0, {self.num_eval_samples})")
        which = np.searchsorted(self._eval_ends, indices, side="right")
        sample = indices - np.concatenate([[0], self._eval_ends])[which]
        for k in np.unique(which):
            rows = which == k
            sample[rows] = FeistelPermutation(self.sources[k].eval_samples, "held-out")(sample[rows])
        return self._read(self._eval, which, sample)

    def eval_plan(self, max_sequences: int) -> dict[str, range]:
        """Indices for `eval` by source, at most `max_sequences` of them: equally many of each source as far as it has them.

        A source without a held-out sample is not in it. The same on every rank, and at every step of a run.
        """
        available = {k: s.eval_samples for k, s in enumerate(self.sources) if s.eval_samples}
        plan, room = {}, max_sequences
        for i, k in enumerate(sorted(available, key=available.__getitem__)):  # the smallest first: what it lacks is left to the others
            count = min(available[k], room // (len(available) - i))
            first = int(self._eval_ends[k]) - available[k]
            plan[k], room = range(first, first + count), room - count
        return {self._names[k]: plan[k] for k in sorted(plan) if plan[k]}

    def num_bytes(self, targets: Tensor) -> int | None:
        """UTF-8 bytes of text that these target ids stand for, in a tensor of any shape; negative ones are none.

        Bits per byte are the targets' summed loss / ln 2 / num_bytes. The end of a document and other special tokens are no bytes of text,
        but their loss counts: where a text ends is part of it. None where the tokenizer's ids are no whole bytes.
        """
        if self._bytes_of_id is None:
            return None
        return int(self._bytes_of_id[targets[targets >= 0].cpu().numpy()].sum())

    def _read(self, streams: list[TokenStream], which: np.ndarray, sample: np.ndarray) -> Tensor:
        out = np.empty((len(which), self._width), dtype=np.int64)
        for row, k, i in zip(out, which.tolist(), sample.tolist()):
            streams[k].read(i * self._seq_len, row)
        if out.size and out.max() >= self.tokenizer.vocab_size:
            row = int(np.argmax(out.max(axis=1)))
            file = streams[which[row]].file_of(int(sample[row]) * self._seq_len + int(np.argmax(out[row])))
            raise DamagedSample(f"{file} is damaged: it holds the token id {out.max()}, the vocabulary has {self.tokenizer.vocab_size}; "
                            f"delete {file.parent} and run again, it will be rebuilt")  # fmt: skip
        return torch.from_numpy(out)

    def _num_samples(self, stream: TokenStream) -> int:
        return max(0, (stream.num_tokens - self._width) // self._seq_len + 1)


def check(config: DataConfig, *, vocab_size: int) -> None:
    """The rules of the data that need no look at any file. Raises ConfigError."""
    if not config.sources:
        raise ConfigError("data.sources", "{}", "a run needs at least one source: data=stdlib, files, hf or synthetic")
    for name, source in config.sources.items():
        sources.check(name, source)
    if not 0 <= config.fim_rate <= 1:
        raise ConfigError("data.fim_rate", config.fim_rate, "is a share of the training documents", min(max(config.fim_rate, 0.0), 1.0))
    t, smallest = config.tokenizer, MIN_BPE_VOCAB + (len(FIM_TOKENS) if config.fim_rate else 0)
    if t.kind == "file" and not t.path:
        raise ConfigError("data.tokenizer.path", "''", "a tokenizer of kind file needs the path of a tokenizer.json")
    if t.kind == "bpe":
        wanted = t.vocab_size or vocab_size
        name = "data.tokenizer.vocab_size" if t.vocab_size else "model.vocab_size"
        if wanted < smallest:
            more = ", and data.fim_rate three ids more" if config.fim_rate else ""
            raise ConfigError(name, wanted, f"a byte-level BPE needs every byte and an end of document{more}", smallest)
        _check_vocab(wanted, vocab_size, name)
    if t.kind == "bytes":
        _check_vocab(smallest, vocab_size, "model.vocab_size")


def open_corpus(config: DataConfig, *, vocab_size: int, seed: int, extra: int = 0, log: Callable[[str], None] = print) -> Corpus:
    """The corpus, built first where its cache is not finished; every rank may call this at once, and they share the work.

    `vocab_size` is the model's; samples hold `extra` tokens more than S + 1.
    Raises ConfigError where the tokenizer needs more, DataError where data is missing or unusable.
    """
    tokenizer, caches = _prepare(config, vocab_size, log)
    with _explained_cache(config):
        for cache in caches:
            cache.build(workers=config.workers, log=log)
            _check_quarantine(cache, config)
        corpus = Corpus(config, caches, tokenizer, seed=seed, extra=extra)
    for summary in corpus.sources:
        if summary.train_samples == 0:
            raise DataError(f"data source {summary.name}: {summary.documents} documents, {summary.train_tokens} training tokens: too few "
                            f"for a sample of data.seq_len + {1 + extra} = {config.seq_len + 1 + extra}; "
                            f"add documents or lower data.seq_len")  # fmt: skip
    if config.eval_fraction > 0 and corpus.num_eval_samples == 0:
        log(
            f"no held-out sample: data.eval_fraction = {config.eval_fraction} of the documents is under {config.seq_len + 1 + extra} tokens"
        )
    return corpus


def build(config: DataConfig, *, vocab_size: int, shard: int = 0, num_shards: int = 1, log: Callable[[str], None] = print) -> None:
    """Tokenise every `num_shards`-th piece of every source from `shard` on; finished pieces are kept, so a rerun goes on.

    Shards may run in any order, on any nodes that share `data.cache_dir`; when all have run, `open_corpus` has nothing to build.
    """
    if not 0 <= shard < num_shards:
        raise ConfigError("shard", shard, f"must lie in [0, {num_shards})")
    _, caches = _prepare(config, vocab_size, log)
    with _explained_cache(config):
        for cache in caches:
            cache.build(workers=config.workers, log=log, shard=shard, num_shards=num_shards)
            _check_quarantine(cache, config)


# ---------------------------------------------------------------- preparation


def _prepare(config: DataConfig, vocab_size: int, log: Callable[[str], None]) -> tuple[Tokenizer, list[SourceCache]]:
    """The tokenizer and the (perhaps unfinished) caches, by source name: the order in which sources are written changes nothing."""
    check(config, vocab_size=vocab_size)
    cache_dir = Path(config.cache_dir).expanduser().absolute()
    with _explained_cache(config):
        opened = [sources.make_source(name, source, cache_dir) for name, source in sorted(config.sources.items())]
        divided = [(source, _divide(source, cache_dir, log)) for source in opened]
        tokenizer = _tokenizer(config, vocab_size, divided, cache_dir, log)
    _check_vocab(tokenizer.vocab_size, vocab_size, "model.vocab_size")
    shares = {"eval_fraction": config.eval_fraction, "fim_rate": config.fim_rate}
    return tokenizer, [SourceCache(s, p, tokenizer, cache_dir=cache_dir, **shares) for s, p in divided]


def _divide(source: Source, cache_dir: Path, log: Callable[[str], None]) -> list[Piece]:
    """The pieces of a source as they were first found: a data set on the Hub may change, a cache that is half built may not."""
    path = cache_dir / "plans" / f"{source.name}-{canonical_hash([FORMAT, source.identity()])[:20]}.json"
    if not path.exists():
        with locked(path.with_suffix(".lock"), wait=True, log=log):
            if not path.exists():
                pieces = [piece.to_json() for piece in source.pieces()]
                write_atomically(path, json.dumps(pieces))
    return [Piece.from_json(value) for value in json.loads(path.read_text(encoding="utf-8"))]


def _tokenizer(config: DataConfig, vocab_size: int, divided, cache_dir: Path, log: Callable[[str], None]) -> Tokenizer:
    t, with_fim = config.tokenizer, config.fim_rate > 0
    if t.kind == "bytes":
        return ByteTokenizer(fim=with_fim)
    if t.kind == "file":
        return load_tokenizer(t.path, t.end_of_document, fim=with_fim)
    wanted = t.vocab_size or vocab_size
    sample = wanted * _BPE_SAMPLE_PER_ID
    key = canonical_hash([FORMAT, wanted, sample, config.eval_fraction, [[s.identity(), [p.to_json() for p in ps]] for s, ps in divided]])
    path = cache_dir / "tokenizers" / f"bpe-{wanted}{'-fim' if with_fim else ''}-{key[:20]}.json"
    if not path.exists():
        with locked(path.with_suffix(".lock"), wait=True, log=log):
            if not path.exists():
                log(f"training a BPE tokenizer of {wanted} ids on {sample / 1e6:.1f} MB of the corpus")
                train_bpe(_sample_texts(divided, sample, config.eval_fraction), wanted, fim=with_fim).save(path)
    return load_tokenizer(path)


def _sample_texts(divided, budget: int, eval_fraction: float) -> Iterator[str]:
    """About `budget` characters of training text: as much of each source, from pieces spread over it. Held-out documents stay unseen."""
    for source, pieces in divided:
        chosen = pieces[:: -(-len(pieces) // _BPE_SAMPLE_PIECES)] if pieces else []
        for piece in chosen:
            room = budget // len(divided) // len(chosen)
            for document in read_hopefully(source, piece):
                if room <= 0:
                    break
                if isinstance(document, Document) and not held_out(document.text, eval_fraction):
                    yield document.text[:room]
                    room -= len(document.text)


def _finished(cache: SourceCache) -> list[PieceRecord]:
    records = [cache.record(p) for p in range(len(cache.pieces))]
    missing = [p for p, record in enumerate(records) if record is None]
    if missing:
        raise DataError(f"the cache {cache.folder} lost piece {missing[0]} while it was opened; do not clean it during a run; run again")
    return records


def _check_vocab(needed: int, vocab_size: int, field: str) -> None:
    if needed > vocab_size:
        value, nearest = (vocab_size, needed) if field == "model.vocab_size" else (needed, vocab_size)
        raise ConfigError(field, value, f"the tokenizer's {needed} ids do not fit the model's {vocab_size}", nearest)


def _check_quarantine(cache: SourceCache, config: DataConfig) -> None:
    """List the unusable documents of the finished pieces in quarantine.jsonl; stop where there are too many."""
    records = [cache.record(p) for p in range(len(cache.pieces))]
    bad, documents = sum(r.bad for r in records if r), sum(r.documents for r in records if r)
    if not bad:
        return
    listed = [cache.path(p, "bad.jsonl") for p, r in enumerate(records) if r and r.bad]
    quarantine = cache.folder / "quarantine.jsonl"
    text = "".join(path.read_text(encoding="utf-8") for path in listed)
    if not quarantine.exists() or quarantine.read_text(encoding="utf-8") != text:  # a finished cache is only read: it may be read-only
        write_atomically(quarantine, text)
    if bad > config.max_bad_fraction * (bad + documents):
        first = json.loads(listed[0].read_text(encoding="utf-8").splitlines()[0])
        raise DataError(f"data source {cache.source.name}: {bad} of {bad + documents} documents are unusable, more than "
                        f"data.max_bad_fraction = {config.max_bad_fraction}; the first: {first['where']}: {first['why']}; "
                        f"all: {quarantine}; repair them, or raise the limit if they may be left out")  # fmt: skip


@contextlib.contextmanager
def _explained_cache(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"data.cache_dir = {config.cache_dir} cannot be used: {error}; choose a folder with room to write") from error
