"""Reading: every kind of file, data sets by folder and from the Hub, and what is said when they cannot be read."""

import gzip
import itertools
import json
import os
import socket

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from shoestring.conf.schema import SourceConfig
from shoestring.train.data import hub, sources
from shoestring.train.data.documents import Bad, DataError, Document
from shoestring.train.data.sources import make_source

TEXTS = ["first\nline two", "größer ☕", "third"]


def read_all(config, cache_dir) -> list[Document | Bad]:
    source = make_source("s", config, cache_dir)
    return [document for piece in source.pieces() for document in source.read(piece)]


def texts_of(config, cache_dir) -> list[str]:
    return [d.text if isinstance(d, Document) else f"BAD {d.why}" for d in read_all(config, cache_dir)]


def write_table(path, rows, schema=None):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


# ---------------------------------------------------------------- files


def test_every_kind_of_file(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"a{i}.txt").write_bytes(text.encode())
        (tmp_path / f"b{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    write_table(tmp_path / "e.parquet", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    for suffix in ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz", "*.parquet"):
        assert texts_of(SourceConfig(kind="files", paths=[str(tmp_path / suffix)]), tmp_path) == TEXTS, suffix
    everything = SourceConfig(kind="files", paths=[str(tmp_path), str(tmp_path / "*.txt")])  # a folder; what is named twice is read once
    assert sorted(texts_of(everything, tmp_path)) == sorted(TEXTS * 5)


@pytest.mark.parametrize(("sample_by", "expected"), [
    ("document", ["one\ntwo\n\nthree\n"]),
    ("line", ["one", "two", "three"]),
    ("paragraph", ["one\ntwo", "three\n"]),
])  # fmt: skip
def test_documents_of_a_text_file(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert texts_of(SourceConfig(kind="files", paths=[str(tmp_path / "a.txt")], sample_by=sample_by), tmp_path) == expected


def test_line_ends_and_byte_order_marks_are_normalised(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\xe2\x80\xa8")
    assert texts_of(SourceConfig(kind="files", paths=[str(tmp_path / "a.txt")]), tmp_path) == ["one\ntwo\nthree\u2028"]


@pytest.mark.parametrize("name", ["a[1].txt", "what?.txt", "star*.jsonl", "two words.parquet", "hash#.txt.gz", "größe.txt"])
def test_names_that_look_like_patterns(tmp_path, name):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / name
    if name.endswith("parquet"):
        write_table(file, [{"text": "x"}])
    else:
        content = b'{"text": "x"}' if name.endswith("jsonl") else b"x"
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    if name.endswith((".txt", ".jsonl")):
        for decoy in ("a1", "whatx", "starx"):  # what the pattern would match: blank, so nothing may come of them
            (tmp_path / "folder" / f"{decoy}{file.suffix}").write_text("")
    assert texts_of(SourceConfig(kind="files", paths=[str(tmp_path / "folder")]), tmp_path) == ["x"]


def test_other_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    write_table(tmp_path / "b.parquet", [{"text": "no", "body": b"bytes are text too"}, {"text": "no", "body": b"\xff"}])
    config = SourceConfig(kind="files", paths=[str(tmp_path)], column="body")
    assert texts_of(config, tmp_path) == ["yes", "bytes are text too", "BAD byte 0xff at offset 0 is not UTF-8"]


def test_parquet_without_the_column_names_what_it_has(tmp_path):
    write_table(tmp_path / "a.parquet", [{"id": 1, "body": "x"}])
    (bad,) = read_all(SourceConfig(kind="files", paths=[str(tmp_path)]), tmp_path)
    assert bad == Bad(where=f"{tmp_path}/a.parquet:row 1", why="no column 'text'; it has id, body")


def test_pieces_hold_every_file_once_whatever_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    for i, size in enumerate([10, 80, 30, 500, 1, 1, 99, 100, 3]):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    source = make_source("s", SourceConfig(kind="files", paths=[str(tmp_path)]), tmp_path)
    pieces = source.pieces()
    assert [f for piece in pieces for f in piece.files] == sorted(str(p) for p in tmp_path.iterdir())
    assert [len(piece.files) for piece in pieces] == [2, 1, 1, 2, 1, 1, 1]
    limited = make_source("s", SourceConfig(kind="files", paths=[str(tmp_path)], max_documents=4), tmp_path)
    assert len(limited.pieces()) == 1 and len(list(limited.read(limited.pieces()[0]))) == 4


@pytest.mark.parametrize("pattern", ["nothing/*.txt", "absent.jsonl"])
def test_missing_paths(tmp_path, pattern):
    (tmp_path / "there.txt").write_text("x")
    paths = [str(tmp_path / "*.txt"), str(tmp_path / pattern)]  # one of them matching does not excuse the other
    found = pattern.replace("*", ".")
    with pytest.raises(DataError, match=rf"data source s: no file matches '.*{found}' \(looked from .*data.sources.s.paths"):
        make_source("s", SourceConfig(kind="files", paths=paths), tmp_path)


def test_unknown_suffixes(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv is none of .txt,"):
        make_source("s", SourceConfig(kind="files", paths=[str(tmp_path / "*")]), tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.gz"])
def test_damaged_files_are_named(tmp_path, name):
    whole = gzip.compress(os.urandom(100_000))
    (tmp_path / name).write_bytes(b"PAR1 no more" if name.endswith("parquet") else whole[:50_000])
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*repair the file"):
        read_all(SourceConfig(kind="files", paths=[str(tmp_path / name)]), tmp_path)


def test_the_damaged_one_of_many_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"whole"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(os.urandom(1000))[:500])
    with pytest.raises(DataError, match=rf"cannot read {tmp_path}/b.txt.gz: "):
        read_all(SourceConfig(kind="files", paths=[str(tmp_path)]), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # nothing is unpacked to the disk


# ---------------------------------------------------------------- standard library and synthetic


def test_standard_library_without_its_tests(tmp_path):
    source = make_source("s", SourceConfig(kind="stdlib"), tmp_path)
    files = [f for piece in source.pieces() for f in piece.files]
    assert len(files) > 400 and "json/decoder.py" in files and files == [p for p, _ in source.identity()["files"]]
    assert not [f for f in files if "site-packages" in f or "/tests/" in f or f.startswith("test/")]


def test_synthetic_documents_have_structure_to_learn(tmp_path):
    """Every word has at most four successors, of two hundred words; all documents differ and are the same in every run."""
    config = SourceConfig(kind="synthetic", num_documents=300)
    texts = texts_of(config, tmp_path)
    assert texts == texts_of(config, tmp_path) and len(set(texts)) == 300
    successors = {}
    for text in texts:
        words = text.split()[1:]
        for word, following in itertools.pairwise(words):
            successors.setdefault(word, set()).add(following)
    assert 150 < len(successors) <= 200 and max(map(len, successors.values())) == 4


# ---------------------------------------------------------------- data sets


@pytest.fixture
def folder(tmp_path):
    """A data set as one copies it from the Hub: two parquet files of one split."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for i in range(2):
        rows = [{"id": j, "text": f"document {i}-{j}"} for j in range(5)]
        write_table(tmp_path / "set" / "data" / f"train-0000{i}-of-00002.parquet", rows)
    return tmp_path / "set"


EXPECTED = [f"document {i}-{j}" for i in range(2) for j in range(5)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_documents", [0, 7, 1000])  # all; over the border of a file; more than there are
def test_local_data_sets(folder, tmp_path, streaming, max_documents):
    config = SourceConfig(kind="hf", dataset=str(folder), streaming=streaming, max_documents=max_documents)
    assert texts_of(config, tmp_path) == EXPECTED[: max_documents or None]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_data_sets_saved_to_disk(tmp_path, streaming, as_dict):
    rows = datasets.Dataset.from_list([{"text": text} for text in EXPECTED])
    (datasets.DatasetDict(train=rows) if as_dict else rows).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(SourceConfig(kind="hf", dataset=str(tmp_path / "saved"), streaming=streaming), tmp_path) == EXPECTED


def test_rows_are_divided_and_found_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_PIECE_DOCUMENTS", 3)
    source = make_source("s", SourceConfig(kind="hf", dataset=str(folder)), tmp_path)
    pieces = source.pieces()
    assert [len(list(source.read(piece))) for piece in pieces] == [3, 3, 3, 1]
    fresh = make_source("s", SourceConfig(kind="hf", dataset=str(folder)), tmp_path)  # another process reads only the third
    assert [d.text for d in fresh.read(pieces[2])] == EXPECTED[6:9]
    assert next(fresh.read(pieces[2])).where.endswith("train row 6")


def test_streams_are_divided_by_shard(folder, tmp_path):
    source = make_source("s", SourceConfig(kind="hf", dataset=str(folder), streaming=True), tmp_path)
    _, second = source.pieces()
    assert [d.text for d in source.read(second)] == EXPECTED[5:]


@pytest.mark.parametrize(("overrides", "message"), [
    ({"column": "body"}, r"has no column 'body'; it has id, text; set data.sources.s.column"),
    ({"split": "test"}, r"split test, cannot be opened: .*test"),
])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_that_lack_what_is_asked(folder, tmp_path, overrides, message, streaming):
    with pytest.raises(DataError, match=message):
        read_all(SourceConfig(kind="hf", dataset=str(folder), streaming=streaming, **overrides), tmp_path)


@pytest.fixture
def online(monkeypatch):
    """The suite tells the Hub's client to stay offline; these tests ask servers of their own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def silent_server(online):
    """Accepts and never answers, like a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_silent_hub(tmp_path, monkeypatch, silent_server):
    api = huggingface_hub.HfApi(endpoint=silent_server)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match=r"s: org/name \(en\), split train, cannot be reached on the Hub \(.*shoestring data build"):
        read_all(SourceConfig(kind="hf", dataset="org/name", subset="en", streaming=True), tmp_path)


def test_unreachable_hub(tmp_path, monkeypatch, online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed again: nobody listens
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(DataError, match=r"cannot be reached on the Hub \(.*refused"):
        read_all(SourceConfig(kind="hf", dataset="org/name"), tmp_path)


def test_names_that_are_neither_on_the_hub_nor_here(tmp_path):
    with pytest.raises(DataError, match=r"\./misspelt/folder/x, split train, is neither on the Hub nor a folder here"):
        read_all(SourceConfig(kind="hf", dataset="./misspelt/folder/x"), tmp_path)


def test_a_divided_data_set_needs_the_hub_no_more(tmp_path, monkeypatch):
    """The commit found when the work was divided is the one that is read, by every later process."""
    from shoestring.conf.schema import DataConfig, TokenizerConfig
    from shoestring.train.data.corpus import build, open_corpus

    asked, opened = [], []

    class Api:
        def dataset_info(self, name, *, revision, timeout):
            asked.append((name, revision))
            return huggingface_hub.DatasetInfo(id=name, sha="c0ffee", tags=[], private=False, downloads=0, likes=0)

    def load(name, subset, *, revision, streaming, **_):
        opened.append(revision)
        return datasets.Dataset.from_list([{"text": f"{text} " * 9} for text in EXPECTED])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(hub, "_PIECE_DOCUMENTS", 3)
    config = DataConfig(sources={"web": SourceConfig(kind="hf", dataset="org/name", revision="v1")}, seq_len=16, cache_dir=str(tmp_path),
                        tokenizer=TokenizerConfig(kind="bytes"))  # fmt: skip
    build(config, vocab_size=257, shard=0, num_shards=2, log=lambda _: None)
    assert open_corpus(config, vocab_size=257, seed=0, log=lambda _: None).sources[0].documents == 10
    assert asked == [("org/name", "v1")] and opened == ["c0ffee", "c0ffee"]
    open_corpus(config, vocab_size=257, seed=0, log=lambda _: None)
    assert len(opened) == 2  # a finished cache opens nothing
