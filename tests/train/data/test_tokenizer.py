"""Text survives tokenising; saved tokenizers are what other programs read; unusable ones are refused by name."""

import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.schema import ConfigError
from shoestring.train.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "der Bär sagt: größer\t" * 20, "naïve café ☕ " * 10]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@given(text=texts)
def test_bytes_are_the_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@given(text=texts)
@settings(max_examples=200)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= i < bpe.vocab_size and i != bpe.eod_id for i in ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_document_cannot_forge_its_end(kind, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    text = f"before {END_OF_DOCUMENT} after"
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eod_id]) == END_OF_DOCUMENT


def test_ids_of_the_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (256, 257)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_file_is_what_the_library_reads(tmp_path, kind, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in [*TEXTS, "", "  \n\n x", "\x00\x7f\xad"]:
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) == ours.encode(text)
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert ours.fingerprint == tokenizer.fingerprint and ours.eod_id == tokenizer.eod_id


def test_bpe_training_is_the_same_in_another_process(bpe):
    program = f"from shoestring.train.data.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, 300).fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "17", "RAYON_NUM_THREADS": "5"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == bpe.fingerprint


def test_bpe_merges_and_keeps_to_its_size(bpe):
    assert bpe.vocab_size <= 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@given(text=texts)
@settings(max_examples=200)
def test_bytes_of_ids_add_up(bpe, text):
    assert sum(bpe.bytes_of_id()[bpe.encode(text)]) == len(text.encode())


def test_bytes_of_special_and_added_tokens(tmp_path, bpe):
    """A special token is no text; an added word that is not special is, and is spelt as it reads."""
    backend = tokenizers.Tokenizer.from_str(bpe._saved)
    backend.add_tokens(["größer"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("viel größer als")
    assert max(ids) == tokenizer.vocab_size - 1  # the added word is in use
    assert sum(tokenizer.bytes_of_id()[ids]) == len("viel größer als".encode())
    assert tokenizer.bytes_of_id()[tokenizer.eod_id] == 0
    assert ByteTokenizer().bytes_of_id().tolist() == [1] * 256 + [0]


def test_any_tokenizer_file(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match=r"data.tokenizer.end_of_document.*</s>"):
        load_tokenizer(tmp_path / "plain.json")
    backend.add_special_tokens(["<stop>"])
    backend.enable_truncation(2)  # a leftover of some other use: documents must not be cut
    backend.save(str(tmp_path / "special.json"))
    with pytest.raises(ConfigError, match="<stop>"):
        load_tokenizer(tmp_path / "special.json", "<end>")
    tokenizer = load_tokenizer(tmp_path / "special.json", "<stop>")
    assert (tokenizer.encode("a b a b zzz"), tokenizer.eod_id, tokenizer.vocab_size) == ([0, 1, 0, 1, 2], 3, 4)
    assert tokenizer.bytes_of_id() is None  # its ids say nothing of the blanks


def test_unreadable_tokenizer_files(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(ConfigError, match=f"data.tokenizer.path = .*at .*{name}"):
            load_tokenizer(tmp_path / name)
