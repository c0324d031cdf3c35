"""Documents of one file, against `datasets` reading the same; and files that say more than they hold, or hold more than they should."""

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shoestring.conf.schema import SourceConfig
from shoestring.train.data import files, token_cache
from shoestring.train.data.documents import HOPELESS, Bad, DataError, Document
from shoestring.train.data.files import read_file
from shoestring.train.data.hub import HubSource

WORDS = st.sampled_from(["a", "b c", "\n", "\n\n", "\r\n", "\r", "\n\n\n", "é☕", "\u2028", "\x0c", "{}", " "])


def texts(path, sample_by="document", column="text"):
    return [d.text if isinstance(d, Document) else f"BAD {d.why}" for d in read_file(str(path), sample_by, column)]


@pytest.mark.parametrize("sample_by", ["document", "line", "paragraph"])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])  # every end falls between two reads; some; none
def test_text_as_datasets_reads_it(tmp_path, monkeypatch, sample_by, chunk):
    """The library's own reader of text, on contents of every kind of line end."""
    from datasets import load_dataset

    monkeypatch.setattr(files, "_CHUNK", chunk)

    @settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(WORDS, max_size=12).map("".join))
    @example("\n\n\na\n\n\n\nb\n")
    @example("")
    def check(text):
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        rows = load_dataset("text", data_files=[str(path)], split="train", streaming=True, sample_by=sample_by)
        assert texts(path, sample_by) == [row["text"] for row in rows if row["text"].strip()]

    check()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_what_is_too_long_is_bad_and_the_next_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_DOCUMENT_LENGTH", 100)
    monkeypatch.setattr(files, "_CHUNK", 16)
    line = json.dumps({"text": "x" * 80}) if "jsonl" in name else "x" * 100
    content = "\n".join([line, "y" * 101, line, "z" * 1000]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    first, bad, third, last = read_file(str(tmp_path / name), "line", "text")
    assert isinstance(first, Document) and isinstance(third, Document) and first.text == third.text
    for line, found in ((2, bad), (4, last)):
        assert found == Bad(where=f"{tmp_path / name}:line {line}", why="over 100 bytes in one document: split it (sample_by)")
    (bad,) = read_file(str(tmp_path / name), "document", "text") if "txt" in name else (bad,)
    assert isinstance(bad, Bad)


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_DOCUMENT_LENGTH", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * (48 << 20)))
    tracemalloc.start()
    try:
        (bad,) = read_file(str(tmp_path / "a.jsonl.gz"), "line", "text")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(bad, Bad) and most < 12 << 20


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_FREE", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"0123456\n" * (1 << 18)))
    with pytest.raises(DataError, match=r"a\.txt\.gz: it unpacks to over 200 times its size"):
        list(read_file(str(tmp_path / "a.txt.gz"), "line", "text"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"0123456\n" * (1 << 16)))  # as steep, and small
    assert len(list(read_file(str(tmp_path / "b.txt.gz"), "line", "text"))) == 1 << 16


def test_rows_that_a_parquet_file_only_claims(tmp_path):
    """Two million rows of a column that is not the one: each would be a line of the quarantine."""
    pyarrow.parquet.write_table(pyarrow.table({"n": pyarrow.array([0]).take(pyarrow.array([0] * 2_000_000))}), tmp_path / "a.parquet")
    found = list(read_file(str(tmp_path / "a.parquet"), "document", "text"))
    assert len(found) == HOPELESS and found[0].why == "no column 'text'; it has n"


def test_many_columns_are_not_all_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({f"{i}" * 50: i for i in range(1000)}))
    (why,) = texts(tmp_path / "a.jsonl")
    assert why.endswith("1000 more") and len(why) < 800


IMAGE = {b"huggingface": json.dumps({"info": {"features": {"text": {"_type": "Image"}}}}).encode()}


def test_a_column_that_is_an_image_opens_nothing(tmp_path):
    """A row of an image column names a file or an address, which `datasets` opens."""
    (tmp_path / "secret.txt").write_text("secret")
    schema = pyarrow.schema([("text", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))], metadata=IMAGE)
    rows = [{"text": {"bytes": None, "path": str(tmp_path / "secret.txt")}}]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "set" / "train.parquet")
    assert texts(tmp_path / "set" / "train.parquet") == ["BAD column 'text' holds a dict, not a string"]
    for streaming in (False, True):
        config = SourceConfig(kind="hf", dataset=str(tmp_path / "set"), streaming=streaming)
        with pytest.raises(DataError, match=r"column 'text' of .*set holds .*and must hold text"):
            HubSource("s", config, tmp_path / "cache").pieces()


def test_the_limit_is_the_same_for_all(tmp_path):
    assert files.MAX_DOCUMENT_LENGTH == token_cache.MAX_DOCUMENT_LENGTH
