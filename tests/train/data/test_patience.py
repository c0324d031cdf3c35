"""Reads that fail: for a while, for good, and those that no patience helps."""

import errno
import os

import numpy as np
import pytest
from shoestring.conf.schema import DataConfig, SourceConfig, TokenizerConfig
from shoestring.train.data import files, patience, token_cache
from shoestring.train.data.corpus import DataError, open_corpus
from shoestring.train.data.patience import may_pass, patiently


def failing(times, error):
    """A read that raises so many times before it answers; and a list of its calls."""
    calls = []

    def read():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "answer"

    return read, calls


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), TimeoutError()])
def test_a_passing_fault_is_waited_for(error):
    slept = []
    read, _ = failing(3, error)
    assert patiently(read, "file", pauses_s=(1, 2, 4, 8), sleep=slept.append) == "answer"
    assert slept == [1, 2, 4]


def test_patience_ends():
    slept = []
    read, calls = failing(99, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        patiently(read, "file", pauses_s=(1, 2), sleep=slept.append)
    assert slept == [1, 2] and len(calls) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no"), ValueError("no JSON")])
def test_what_does_not_pass_is_raised_at_once(error):
    read, calls = failing(1, error)
    with pytest.raises(type(error)):
        patiently(read, "file", sleep=lambda s: None)
    assert len(calls) == 1


def test_the_cause_counts_whatever_the_libraries_made_of_it():
    try:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as cause:
            raise DataError("cannot read a.txt") from cause
    except DataError as error:
        assert may_pass(error)
    assert not may_pass(DataError("no text in a.txt"))


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * 20)
    source = SourceConfig(kind="files", paths=[str(folder)])
    return DataConfig(
        sources={"text": source}, tokenizer=TokenizerConfig(kind="bytes"), seq_len=16, workers=2, cache_dir=str(tmp_path / "cache")
    )


def test_tokens_on_a_disk_that_is_away(config, monkeypatch):
    """For two reads, then for good: as from a clean disk, then an error that names the file."""
    monkeypatch.setattr(patience, "PAUSES_S", (0.0, 0.0, 0.0))
    corpus = open_corpus(config, vocab_size=300, seed=0, log=lambda line: None)
    expected, pread, left = corpus.train(range(8)), os.pread, [2]

    def away(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(token_cache.os, "pread", away)
    assert (corpus.train(range(8)) == expected).all() and left[0] < 0
    left[0] = 10**9
    with pytest.raises(DataError, match=r"00000\.train\.bin cannot be read: .*Input/output error.*file system"):
        corpus.train(range(8))


def test_a_file_that_was_cut_since(config):
    corpus = open_corpus(config, vocab_size=300, seed=0, log=lambda line: None)
    corpus._train[0].file_of(0).write_bytes(b"\0" * 40)
    with pytest.raises(DataError, match=r"00000\.train\.bin was cut: it ends before token .*rebuilt"):
        corpus.train(range(8))


def test_sources_on_a_disk_that_is_away(config, monkeypatch):
    """The piece that was being built is begun again, and is the same."""
    monkeypatch.setattr(patience, "PAUSES_S", (0.0, 0.0))
    whole, left = files._open, [2]

    def away(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return whole(*args, **kwargs)

    monkeypatch.setattr(files, "_open", away)
    rows = open_corpus(config, vocab_size=300, seed=0, log=lambda line: None).train(np.arange(8))
    monkeypatch.setattr(files, "_open", whole)
    clean = open_corpus(DataConfig(**{**vars(config), "cache_dir": config.cache_dir + "2"}), vocab_size=300, seed=0, log=lambda line: None)
    assert left[0] < 0 and (rows == clean.train(np.arange(8))).all()
