"""Fill in the middle: undoing the reordering gives the document back, as often as asked, in training documents only."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.schema import ConfigError, DataConfig, SourceConfig, TokenizerConfig
from shoestring.train.data.corpus import open_corpus
from shoestring.train.data.fim import cut
from shoestring.train.data.token_cache import held_out
from shoestring.train.data.tokenizer import FIM_TOKENS, ByteTokenizer, load_tokenizer, train_bpe

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(text=texts)
def test_the_parts_are_the_text(text):
    prefix, middle, suffix = cut(text, 1.0)
    assert prefix + middle + suffix == text
    assert cut(text, 1.0) == (prefix, middle, suffix) and cut(text, 0.0) is None


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_the_asked_one(rate):
    """Binomial over 20,000 documents, within five deviations; a higher rate reorders a superset."""
    documents = [f"document {i}" for i in range(20_000)]
    reordered = {d for d in documents if cut(d, rate)}
    assert abs(len(reordered) - 20_000 * rate) < 5 * (20_000 * rate * (1 - rate)) ** 0.5
    assert all(cut(d, rate) == cut(d, 0.9) for d in reordered)


def test_cuts_are_uniform_and_do_not_depend_on_the_choice():
    """Each of the 10 + 1 borders is cut equally often (4,000 draws, 364 expected each), also where a small rate chooses the document."""
    for rate in (0.1, 1.0):
        chosen = [parts for i in range(20_000) if (parts := cut(f"{i:010d}", rate))][:2000]
        borders = [b for prefix, middle, _ in chosen for b in (len(prefix), len(prefix) + len(middle))]
        counts = np.bincount(borders, minlength=11)
        expected = len(borders) / 11
        assert len(counts) == 11 and (np.abs(counts - expected) < 5 * expected**0.5).all()


def data_config(folder, documents, **overrides) -> DataConfig:
    (folder / "text").mkdir(exist_ok=True)
    for i, text in enumerate(documents):
        (folder / "text" / f"{i:03d}.txt").write_bytes(text.encode())
    fields = {
        "tokenizer": TokenizerConfig(kind="bytes"),
        "fim_rate": 0.5,
        "eval_fraction": 0.2,
        "seq_len": 1,
        "cache_dir": str(folder / "c"),
    }
    return DataConfig(sources={"t": SourceConfig(kind="files", paths=[str(folder / "text")])}, **(fields | overrides))


def open_quietly(config, vocab_size=512):
    return open_corpus(config, vocab_size=vocab_size, seed=0, log=lambda _: None)


def split_at_ends(stream, eod) -> list[list[int]]:
    parts = [[]]
    for i in stream:
        parts.append([]) if i == eod else parts[-1].append(i)
    return parts[:-1]


def written(folder, split, dtype="<u2") -> list[int]:
    """All token ids of a split, in order, from its files."""
    return np.concatenate([np.fromfile(path, dtype) for path in sorted(folder.glob(f"c/tokens/*/*.{split}.bin"))]).tolist()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_corpus_can_be_put_back_in_order(tmp_path, kind):
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("ab é\n☕"), int(rng.integers(1, 60)))) + f"#{i}" for i in range(80)]
    tokenizer = open_quietly(data_config(tmp_path, documents, tokenizer=TokenizerConfig(kind=kind)), vocab_size=300).tokenizer
    begin, hole, end = (tokenizer._backend.token_to_id(token) for token in FIM_TOKENS)
    found, reordered = {False: [], True: []}, 0
    for split in ("train", "eval"):
        for ids in split_at_ends(written(tmp_path, split), tokenizer.eod_id):
            if begin in ids:
                reordered += 1
                assert split == "train" and ids[0] == begin and ids.count(hole) == ids.count(end) == 1
                prefix, rest = ids[1 : ids.index(hole)], ids[ids.index(hole) + 1 :]
                suffix, middle = rest[: rest.index(end)], rest[rest.index(end) + 1 :]
                found[split == "eval"].append("".join(tokenizer.decode(part) for part in (prefix, middle, suffix)))
            else:
                assert hole not in ids and end not in ids
                found[split == "eval"].append(tokenizer.decode(ids))
    assert found == {held: [d for d in documents if held_out(d, 0.2) == held] for held in (False, True)}
    assert 15 < reordered < 50


def test_without_it_nothing_changes(tmp_path):
    """No ids are added; and each rate has a cache of its own."""
    documents = ["some text to read, and then more of it\n" * 3] * 4
    config = data_config(tmp_path, documents)
    for rate in (0.0, 0.1, 0.2):
        open_quietly(dataclasses.replace(config, fim_rate=rate))
    assert len(list((tmp_path / "c" / "tokens").iterdir())) == 3
    assert (ByteTokenizer().vocab_size, ByteTokenizer(fim=True).vocab_size) == (257, 260)
    assert ByteTokenizer().fim_ids is None and ByteTokenizer(fim=True).fim_ids == (257, 258, 259)
    assert ByteTokenizer(fim=True).bytes_of_id()[256:].tolist() == [0] * 4
    plain, filled = (train_bpe(documents, 270, fim=fim) for fim in (False, True))
    assert plain.fim_ids is None and len(set(filled.fim_ids)) == 3 and filled.vocab_size <= 270


@pytest.mark.parametrize(
    "spelling",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: begin, prefix, hole, suffix, end, middle
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ],
)
def test_tokens_of_a_tokenizer_file(tmp_path, spelling):
    backend = tokenizers.Tokenizer.from_str(ByteTokenizer()._saved)
    backend.add_special_tokens([spelling[2], spelling[1], "<other>", spelling[0]])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").fim_ids == (260, 258, 257)


def test_what_is_refused(tmp_path):
    config = data_config(tmp_path, ["text"])
    with pytest.raises(ConfigError, match=r"model.vocab_size = 259: .*nearest valid value: 260"):
        open_quietly(config, vocab_size=259)
    with pytest.raises(ConfigError, match=r"data.fim_rate = 1.5.*nearest valid value: 1"):
        open_quietly(data_config(tmp_path, ["text"], fim_rate=1.5))
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    named = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"data.tokenizer.path = .*tokenizer.json: data.fim_rate needs .*<｜fim▁begin｜>.*<fim_prefix>"):
        open_quietly(data_config(tmp_path, ["text"], tokenizer=named))
