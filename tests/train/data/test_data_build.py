"""Building the cache: several processes at once, builders that die, shards on nodes, damage, and what is refused."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from shoestring.conf.schema import ConfigError, DataConfig, SourceConfig, TokenizerConfig
from shoestring.launch.local import fork_ranks
from shoestring.train.data import corpus as data
from shoestring.train.data import sources, token_cache
from shoestring.train.data.corpus import DataError, build, open_corpus
from shoestring.train.data.sources import SyntheticSource

S = 32
VOCAB = 512
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_DOCUMENTS", 20)  # 100 documents are 5 pieces


def data_config(cache_dir, source=None, **overrides) -> DataConfig:
    source = source or SourceConfig(kind="synthetic", num_documents=100)
    fields = {"tokenizer": TokenizerConfig(kind="bpe", vocab_size=300), "seq_len": S, "eval_fraction": 0.1, "cache_dir": str(cache_dir)}
    return DataConfig(sources={"one": source}, **{**fields, **overrides})


def open_logged(config) -> tuple[data.Corpus, list[str]]:
    lines: list[str] = []
    return open_corpus(config, vocab_size=VOCAB, seed=0, log=lines.append), lines


def tokens_folder(cache_dir) -> Path:
    (folder,) = (Path(cache_dir) / "tokens").iterdir()
    return folder


def token_files(cache_dir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(tokens_folder(cache_dir).glob("*.bin"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one undisturbed process builds: its token files and its fingerprint."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_DOCUMENTS", 20)
        return token_files_and_fingerprint(folder)


def token_files_and_fingerprint(folder):
    corpus, _ = open_logged(data_config(folder))
    return token_files(folder), corpus.fingerprint


# ---------------------------------------------------------------- races


def _open_on_rank(cache_dir):
    dist.barrier()  # all start at once; and none ends while another is still being connected
    corpus, lines = open_logged(data_config(cache_dir))
    return corpus.fingerprint, corpus.train(range(64)), lines


def test_ranks_race_for_an_empty_cache(tmp_path, alone):
    answers = fork_ranks(4, _open_on_rank, tmp_path)
    assert {fingerprint for fingerprint, _, _ in answers} == {alone[1]}
    assert all((samples == answers[0][1]).all() for _, samples, _ in answers)
    assert token_files(tmp_path) == alone[0]
    lines = [line for _, _, lines in answers for line in lines]
    assert sum("training a BPE" in line for line in lines) == 1
    finished = [line.split(":")[1] for line in lines if " tokens in " in line]
    assert sorted(finished) == [f" piece {i} of 5" for i in range(1, 6)]  # each once, whoever did it


def test_file_systems_without_locks(tmp_path, alone, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)  # ranks inherit it
    answers = fork_ranks(3, _open_on_rank, tmp_path)
    assert {fingerprint for fingerprint, _, _ in answers} == {alone[1]}
    assert token_files(tmp_path) == alone[0]


def test_waiters_outlive_a_dead_builder(tmp_path, alone):
    """A process holds every lock and dies without a word; the one that waited for it finishes the work."""
    config = data_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache.SourceCache, "_build_piece", lambda *_: None)
        build(config, vocab_size=VOCAB, log=lambda _: None)  # makes the tokenizer and the folder, no piece
    held, waiting = fork.Event(), fork.Event()

    def holder():
        with contextlib.ExitStack() as stack:
            for p in range(5):
                stack.enter_context(token_cache.locked(tokens_folder(tmp_path) / f"{p:05d}.lock", wait=False, log=print))
            held.set()
            signal.pause()

    def waiter(answers):
        corpus = open_corpus(config, vocab_size=VOCAB, seed=0, log=lambda line: waiting.set() if "waiting" in line else None)
        answers.put(corpus.fingerprint)

    answers = fork.Queue()
    first, second = fork.Process(target=holder), fork.Process(target=waiter, args=(answers,))
    try:
        first.start()
        assert held.wait(60)
        second.start()
        assert waiting.wait(60) and answers.empty()
        first.kill()
        assert answers.get(timeout=60) == alone[1]
    finally:
        first.kill(), second.kill()
        first.join(), second.join()


def test_killed_builder_is_continued(tmp_path, alone, monkeypatch):
    """SIGKILL in the middle of the third piece: a rerun keeps the first two untouched and makes the same bytes."""
    read = SyntheticSource.read

    def deadly(self, piece):
        for i, document in enumerate(read(self, piece)):
            if piece.start == 40 and i == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    monkeypatch.setattr(token_cache, "_BATCH_BYTES", 100)  # so that half the piece is written when it strikes
    monkeypatch.setattr(SyntheticSource, "read", deadly)
    config = data_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # the tokenizer's sample reads all pieces: it is not what dies here
        patch.setattr(SyntheticSource, "read", read)
        patch.setattr(token_cache.SourceCache, "_build_piece", lambda *_: None)
        build(config, vocab_size=VOCAB, log=lambda _: None)
    child = fork.Process(target=open_logged, args=(config,))
    child.start(), child.join()
    assert child.exitcode == -signal.SIGKILL
    folder = tokens_folder(tmp_path)
    assert sorted(p.name for p in folder.glob("*.json")) == ["00000.json", "00001.json"]
    assert list(folder.glob("00002.*.tmp"))
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("0000[01].*") if p.suffix in (".bin", ".json")}

    monkeypatch.setattr(SyntheticSource, "read", read)
    corpus, _ = open_logged(config)
    assert corpus.fingerprint == alone[1] and token_files(tmp_path) == alone[0]
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("victim", ["train.bin", "eval.bin", "json"])
def test_killed_while_files_appear(tmp_path, alone, monkeypatch, victim):
    """SIGKILL just before one file of the second piece appears: the piece does not count as finished."""
    replace = os.replace

    def deadly(source, target):
        if str(target).endswith(f"00001.{victim}"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", deadly)
    child = fork.Process(target=open_logged, args=(data_config(tmp_path),))
    child.start(), child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in tokens_folder(tmp_path).glob("*.json")] == ["00000.json"]
    monkeypatch.setattr(os, "replace", replace)
    corpus, _ = open_logged(data_config(tmp_path))
    assert corpus.fingerprint == alone[1] and token_files(tmp_path) == alone[0]


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("num_shards", [2, 3, 7])  # even share, uneven share, more nodes than pieces
def test_shards_build_what_one_process_builds(tmp_path, alone, num_shards):
    config = data_config(tmp_path)
    for shard in reversed(range(num_shards)):
        build(config, vocab_size=VOCAB, shard=shard, num_shards=num_shards, log=lambda _: None)
    corpus, lines = open_logged(config)
    assert lines == []  # nothing was left to do
    assert corpus.fingerprint == alone[1] and token_files(tmp_path) == alone[0]


def test_a_shard_builds_its_part_once(tmp_path):
    config, lines = data_config(tmp_path), []
    for _ in range(2):
        build(config, vocab_size=VOCAB, shard=1, num_shards=2, log=lines.append)
    assert [line.split(":")[1] for line in lines if " tokens in " in line] == [" piece 2 of 5", " piece 4 of 5"]
    with pytest.raises(ConfigError, match="shard = 2"):
        build(config, vocab_size=VOCAB, shard=2, num_shards=2)


# ---------------------------------------------------------------- the finished cache


def test_a_finished_cache_is_only_read(tmp_path, monkeypatch):
    config = data_config(tmp_path)
    open_logged(config)

    def forbidden(*_, **__):
        raise AssertionError("a finished cache was locked or written")

    for module in (data, token_cache):
        monkeypatch.setattr(module, "locked", forbidden)
        monkeypatch.setattr(module, "write_atomically", forbidden)
    assert open_logged(config)[1] == []


def test_a_cut_file_is_rebuilt(tmp_path, alone):
    config = data_config(tmp_path)
    open_logged(config)
    victim = tokens_folder(tmp_path) / "00001.train.bin"
    os.truncate(victim, victim.stat().st_size // 2)
    corpus, lines = open_logged(config)
    assert corpus.fingerprint == alone[1] and token_files(tmp_path) == alone[0]
    assert sum(" tokens in " in line for line in lines) == 1


def test_an_impossible_token_names_the_damaged_file(tmp_path):
    config = data_config(tmp_path)
    open_logged(config)
    victim = tokens_folder(tmp_path) / "00003.train.bin"
    np.memmap(victim, dtype="<u2", mode="r+")[7] = 60_000
    corpus, _ = open_logged(config)
    with pytest.raises(DataError, match=r"00003.train.bin is damaged.* 60000.*delete"):
        corpus.train(range(corpus.sources[0].train_samples))


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_logged(data_config("~/deep/cache"))
    assert (tmp_path / "deep" / "cache" / "tokens").is_dir()


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data.cache_dir = .*file/cache.*choose a folder"):
        open_logged(data_config(tmp_path / "file" / "cache"))


# ---------------------------------------------------------------- quarantine


def mixed_file(folder, good=20) -> tuple[SourceConfig, list[tuple[int, str]]]:
    """A .jsonl with `good` documents and one of each way to be bad; the bad ones' line numbers and what must be said of them."""
    bad = [
        (b'{"text": "caf\xe9"}', "byte 0xe9"), (b'{"txt": "misnamed"}', "no column 'text'; it has txt"), (b'{"text": 5}', "holds a int"),
        (b'{"text": null}', "holds a NoneType"), (b"[1, 2]", "a list, not an object"), (b'{"text": "cut off', "not JSON"),
        (rb'{"text": "\ud800"}', "lone surrogate"),
    ]  # fmt: skip
    lines = [json.dumps({"text": f"document {i} " * 10}).encode() for i in range(good)]
    for i, (line, _) in enumerate(bad):
        lines.insert(2 * i + 1, line)
    (folder / "mixed.jsonl").write_bytes(b"\n".join([*lines, b"", b""]))  # blank lines are nothing, good or bad
    return SourceConfig(kind="files", paths=[str(folder / "mixed.jsonl")]), [(2 * i + 2, why) for i, (_, why) in enumerate(bad)]


def test_bad_documents_are_listed_and_left_out(tmp_path):
    source, bad = mixed_file(tmp_path)
    corpus, _ = open_logged(data_config(tmp_path / "cache", source, max_bad_fraction=0.5))
    assert (corpus.sources[0].documents, corpus.num_quarantined) == (20, len(bad))
    listed = [json.loads(line) for line in (tokens_folder(tmp_path / "cache") / "quarantine.jsonl").read_text().splitlines()]
    for entry, (line, why) in zip(listed, bad, strict=True):
        assert entry["where"] == f"{tmp_path}/mixed.jsonl:line {line}" and why in entry["why"]


def test_too_many_bad_documents_stop_the_run(tmp_path):
    source, bad = mixed_file(tmp_path)
    strict, exact = (data_config(tmp_path / "cache", source, max_bad_fraction=share) for share in (len(bad) / 27 - 0.001, len(bad) / 27))
    with pytest.raises(DataError, match=r"7 of 27 documents.*max_bad_fraction = 0.258.*mixed.jsonl:line 2: byte 0xe9.*quarantine.jsonl"):
        open_logged(strict)
    with pytest.raises(DataError, match="7 of 27"):  # the cache being there does not make it better
        open_logged(strict)
    with pytest.raises(DataError, match="7 of 27"):
        build(strict, vocab_size=VOCAB, log=lambda _: None)
    assert not any("tokenise" in line for line in open_logged(exact)[1])  # at the limit it passes, and nothing is tokenised again


def test_hopeless_corpora_stop_early(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n' * 50_000)
    source = SourceConfig(kind="files", paths=[str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match=r"1000 documents in a row are unusable.*a.jsonl:line 1000: no column 'text'; it has txt"):
        open_logged(data_config(tmp_path / "cache", source, max_bad_fraction=0.9))


def test_ids_outside_the_vocabulary_are_quarantined(tmp_path, monkeypatch):
    encode = data.ByteTokenizer.encode_documents
    shifted = lambda self, texts: [ids + 140 * (max(ids) > 126) for ids in encode(self, texts)]  # é becomes 0xc3 + 140 = 335
    monkeypatch.setattr(data.ByteTokenizer, "encode_documents", shifted)
    for i, text in enumerate(["plain " * 40, "é " * 80, "plain again " * 40]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    config = data_config(tmp_path / "cache", SourceConfig(kind="files", paths=[str(tmp_path)]), tokenizer=TokenizerConfig(kind="bytes"),
                         max_bad_fraction=0.5, eval_fraction=0.0)  # fmt: skip
    corpus, _ = open_logged(config)
    assert (corpus.sources[0].documents, corpus.num_quarantined) == (2, 1)
    assert "1.txt" in (quarantine := (tokens_folder(tmp_path / "cache") / "quarantine.jsonl").read_text()) and "token id 335" in quarantine


def test_over_long_documents_are_quarantined(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MAX_DOCUMENT_LENGTH", 300)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * (301 if i == 4 else 300))
    source = SourceConfig(kind="files", paths=[str(tmp_path)])
    corpus, _ = open_logged(data_config(tmp_path / "cache", source, max_bad_fraction=0.1, eval_fraction=0.0,
                                        tokenizer=TokenizerConfig(kind="bytes")))  # fmt: skip
    assert (corpus.sources[0].documents, corpus.num_quarantined) == (9, 1)


# ---------------------------------------------------------------- what is refused


def files_of(folder, *texts) -> SourceConfig:
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return SourceConfig(kind="files", paths=[str(folder / "*.txt")])


def test_empty_and_short_corpora(tmp_path):
    def open_texts(*texts):
        tokenizer = TokenizerConfig(kind="bytes")
        return open_logged(data_config(tmp_path / "cache", files_of(tmp_path, *texts), tokenizer=tokenizer, eval_fraction=0.0))[0]

    with pytest.raises(DataError, match=r"data source one: 0 documents, 0 training tokens.*data.seq_len \+ 1 = 33"):
        open_texts("", "  \n")
    with pytest.raises(DataError, match=r"1 documents, 32 training tokens"):
        open_texts("x" * 31)
    corpus = open_texts("x" * 32)
    assert corpus.train([0, 1]).shape == (2, 33)  # one sample is enough: every epoch is that sample


def test_nothing_held_out_is_said(tmp_path):
    corpus, lines = open_logged(data_config(tmp_path / "cache", files_of(tmp_path, "one document only " * 20), eval_fraction=1e-9))
    assert corpus.num_eval_samples == 0 and any("no held-out sample" in line for line in lines)
    with pytest.raises(IndexError, match=r"data\.eval_fraction"):
        corpus.eval([0])


@pytest.mark.parametrize(("overrides", "message"), [
    ({"tokenizer": TokenizerConfig(kind="bpe", vocab_size=600)}, r"data.tokenizer.vocab_size = 600: .*nearest valid value: 512"),
    ({"tokenizer": TokenizerConfig(kind="bpe", vocab_size=200)}, r"data.tokenizer.vocab_size = 200: .*nearest valid value: 257"),
    ({"tokenizer": TokenizerConfig(kind="file")}, r"data.tokenizer.path"),
    ({"source": SourceConfig(kind="files")}, r"data.sources.one.paths"),
    ({"source": SourceConfig(kind="hf")}, r"data.sources.one.dataset"),
    ({"source": SourceConfig(kind="synthetic")}, r"data.sources.one.num_documents"),
    ({"source": SourceConfig(kind="files", paths=["x"], sample_by="sentence")}, r"data.sources.one.sample_by = sentence"),
])  # fmt: skip
def test_configurations_refused_before_anything_is_read(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        open_logged(data_config(tmp_path, **overrides))
    assert not list(tmp_path.iterdir())


def test_models_too_small_for_the_tokenizer(tmp_path):
    for tokenizer in (TokenizerConfig(kind="bytes"), TokenizerConfig(kind="bpe")):
        with pytest.raises(ConfigError, match=r"model.vocab_size = 256: .*nearest valid value: 257"):
            open_corpus(data_config(tmp_path, tokenizer=tokenizer), vocab_size=256, seed=0)
    data.ByteTokenizer().save(tmp_path / "tokenizer.json")
    given = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100: the tokenizer's 257 ids.*nearest valid value: 257"):
        open_corpus(data_config(tmp_path, tokenizer=given), vocab_size=100, seed=0)


def test_a_run_without_sources():
    with pytest.raises(ConfigError, match=r"data.sources"):
        open_logged(DataConfig(seq_len=S))
