"""The stream of samples against brute force: what is in it, in which order, at which shares, and that only its position matters."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shoestring.conf.schema import DataConfig, SourceConfig, TokenizerConfig
from shoestring.train.data import sources
from shoestring.train.data.corpus import Corpus, Position, open_corpus
from shoestring.train.data.token_cache import held_out

S = 32  # sequence length
EOD = 256


def data_config(cache_dir, sources=None, **overrides) -> DataConfig:
    sources = sources or {"made": SourceConfig(kind="synthetic", num_documents=60)}
    fields = {"tokenizer": TokenizerConfig(kind="bytes"), "seq_len": S, "eval_fraction": 0.2, "workers": 2, "cache_dir": str(cache_dir)}
    return DataConfig(sources=sources, **{**fields, **overrides})


def open_quietly(config, vocab_size=512, seed=0, extra=0) -> Corpus:
    return open_corpus(config, vocab_size=vocab_size, seed=seed, extra=extra, log=lambda _: None)


def write_documents(folder, name, documents):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(documents):
        (folder / f"{name}{i:03d}.txt").write_bytes(text.encode())
    return SourceConfig(kind="files", paths=[str(folder / f"{name}*.txt")])


def words(rng, n):
    return " ".join("".join(rng.choice(list("abcdeé")) for _ in range(rng.integers(1, 9))) for _ in range(n))


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [words(rng, int(rng.integers(1, 120))) for _ in range(70)]


@pytest.fixture(scope="module")
def packed(documents):
    """By hand: the token ids of both splits, documents in the order of their files, each with its end."""
    splits = ([], [])
    for text in documents:
        splits[held_out(text, 0.2)].extend([*text.encode(), EOD])
    return splits


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("corpus")
    config = data_config(folder / "cache", {"text": write_documents(folder / "text", "d", documents)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", 300)  # many pieces: samples cross their borders, some pieces are shorter than a sample
        corpus = open_quietly(config)
    assert len(list((folder / "cache").glob("tokens/*/*.train.bin"))) > 30
    return corpus


def slices(tokens):
    return [tuple(tokens[i * S : i * S + S + 1]) for i in range((len(tokens) - 1) // S)]


def rows(samples):
    return [tuple(row) for row in samples.tolist()]


def test_an_epoch_is_every_sample_once(corpus, packed):
    expected = slices(packed[0])
    epoch = corpus.train(range(len(expected)))
    assert epoch.dtype == torch.int64 and epoch.shape == (len(expected), S + 1)
    assert sorted(rows(epoch)) == sorted(expected)
    assert rows(epoch) != expected  # shuffled
    assert corpus.sources[0].train_samples == len(expected) and corpus.num_train_tokens == len(packed[0])


def test_the_next_epoch_is_the_same_samples_in_another_order(corpus, packed):
    n = len(slices(packed[0]))
    epochs = [rows(corpus.train(range(e * n, e * n + n))) for e in range(3)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows(corpus.train([n - 1, n, 2 * n + 3])) == [epochs[0][-1], epochs[1][0], epochs[2][3]]  # one read across epochs


def test_held_out_samples_are_all_there_once(corpus, packed):
    expected = slices(packed[1])
    assert corpus.num_eval_samples == len(expected) > 5
    assert sorted(rows(corpus.eval(range(len(expected))))) == sorted(expected)
    with pytest.raises(IndexError):
        corpus.eval([len(expected)])


def test_held_out_share():
    """Binomial: of 20,000 documents, 2 % within six deviations (20 each); none and nearly all at the ends."""
    count = lambda share: sum(held_out(f"document {i}", share) for i in range(20_000))
    assert abs(count(0.02) - 400) < 120
    assert count(0.0) == 0 and count(0.999999) > 19_990


def test_no_document_is_on_both_sides(corpus, documents):
    """Marks of 12 bytes: none of a held-out document occurs in any training sample."""
    train = bytes(t % 256 for t in corpus.train(range(corpus.sources[0].train_samples))[:, :-1].reshape(-1).tolist())
    hidden = [d.encode() for d in documents if held_out(d, 0.2) and len(d.encode()) >= 12]
    shown = [d.encode() for d in documents if not held_out(d, 0.2) and len(d.encode()) >= 12]
    assert hidden and not any(d[:12] in train for d in hidden)
    assert sum(d[:12] in train for d in shown) > len(shown) / 2  # cut ones aside, the mark does find what is there


@given(start=st.integers(0, 10_000), count=st.integers(1, 40), world=st.sampled_from([1, 2, 3, 8]), later=st.sampled_from([1, 2, 5]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_world_size_resumes_at_any_position(corpus, start, count, world, later):
    """Ranks read their strided parts; the union over ranks is the stream, and a resumed run with other ranks continues it."""
    position = Position(phase=0, index=start)
    stream = corpus.train(np.arange(position.index, position.index + 2 * count))
    first = [corpus.train(np.arange(start + r, start + count, world)) for r in range(world)]
    second = [corpus.train(np.arange(start + count + r, start + 2 * count, later)) for r in range(later)]
    together = sorted(row for part in first + second for row in rows(part))
    assert together == sorted(rows(stream))


@pytest.mark.parametrize("extra", [1, 7])  # 7 of 8: the last sample is nearly always missing
def test_samples_with_extra_targets(tmp_path, documents, extra):
    """For each extra token a sample goes on into the next ones; the last sample is there only if its extra tokens are."""
    splits = ([], [])
    for text in documents:
        splits[held_out(text, 0.2)].extend([*text.encode(), EOD])
    config = data_config(tmp_path / "c", {"t": write_documents(tmp_path / "text", "d", documents)}, seq_len=8)
    corpus = open_quietly(config, extra=extra)
    for tokens, read, count in (
        (splits[0], corpus.train, corpus.sources[0].train_samples),
        (splits[1], corpus.eval, corpus.num_eval_samples),
    ):
        wanted = [tuple(tokens[i : i + 9 + extra]) for i in range(0, len(tokens), 8) if i + 9 + extra <= len(tokens)]
        assert count == len(wanted) and sorted(rows(read(range(count)))) == sorted(wanted)
    assert corpus.train([]).shape == corpus.eval([]).shape == (0, 9 + extra)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), room=st.integers(0, 80))
def test_evaluation_is_divided_fairly(sizes, room):
    """Against one sequence at a time, dealt in turns to the sources that still have some."""
    corpus = object.__new__(Corpus)
    corpus.sources = [SimpleNamespace(eval_samples=n) for n in sizes]
    corpus._names, corpus._eval_ends = [f"s{k}" for k in range(len(sizes))], np.cumsum(sizes)
    plan = corpus.eval_plan(room)
    counts = [len(plan.get(f"s{k}", ())) for k in range(len(sizes))]
    assert sum(counts) == min(room, sum(sizes))
    fullest = max(counts)
    assert all(c == n or c >= fullest - 1 for c, n in zip(counts, sizes))  # who got fewer has no more
    assert all(r.start == sum(sizes[: int(name[1:])]) and len(r) > 0 for name, r in plan.items())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_of_targets(tmp_path, documents, kind):
    """All held-out targets of a single stream stand for the documents' bytes; ends of documents and ignored targets for none."""
    source = write_documents(tmp_path / "text", "d", documents)
    config = data_config(tmp_path / "c", {"t": source}, seq_len=1, tokenizer=TokenizerConfig(kind=kind))
    corpus = open_quietly(config, vocab_size=300)
    targets = corpus.eval(range(corpus.num_eval_samples))[:, 1:]
    first = corpus.tokenizer.encode(next(d for d in documents if held_out(d, 0.2)))[0]  # never a target
    whole = sum(len(d.encode()) for d in documents if held_out(d, 0.2))
    assert corpus.num_bytes(targets) == whole - len(corpus.tokenizer.decode([first]).encode())
    assert corpus.num_bytes(torch.tensor([[-100, corpus.tokenizer.eod_id], [-1, -100]])) == 0


def test_seeds_and_phases_change_the_order_only(tmp_path):
    config = data_config(tmp_path)
    n = open_quietly(config).sources[0].train_samples
    orders = [rows(open_quietly(config, seed=seed).train(range(n), phase)) for seed, phase in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert orders[0] == orders[3]
    assert len({str(o) for o in orders}) == 3 and len({str(sorted(o)) for o in orders}) == 1


def test_evaluation_does_not_depend_on_the_seed(tmp_path):
    first, second = (open_quietly(data_config(tmp_path), seed=seed) for seed in (0, 1))
    assert torch.equal(first.eval(range(first.num_eval_samples)), second.eval(range(first.num_eval_samples)))


def test_mixture_of_sources(tmp_path):
    """Sources marked by their letters: shares follow the weights at every prefix, though one runs through many epochs."""
    rng = np.random.default_rng(1)
    texts = {s: ["".join(rng.choice(list(alphabet), 100)) for _ in range(40)] for s, alphabet in (("x", "abcd"), ("y", "vwxy"))}
    sources = {name: write_documents(tmp_path / name, name, t) for name, t in texts.items()}
    sources["x"].weight, sources["y"].weight = 1.0, 3.0
    corpus = open_quietly(data_config(tmp_path / "cache", sources))
    samples = corpus.train(range(2000))
    from_y = _letters(samples, "vwxy") > S / 2
    shares = torch.cumsum(from_y, 0) / torch.arange(1, 2001)
    assert abs(shares[-1] - 0.75) < 1e-3 and (shares[100:] - 0.75).abs().max() < 0.02
    epoch = corpus.sources[1].train_samples
    read = rows(samples[from_y])[: (1500 // epoch) * epoch]
    assert {read.count(r) for r in set(read)} == {1500 // epoch}  # whole epochs: every sample of `y` equally often
    assert len(set(rows(corpus.eval(range(corpus.num_eval_samples))))) == sum(s.eval_samples for s in corpus.sources)  # each once
    for name, indices in corpus.eval_plan(10).items():
        held = corpus.eval(indices)
        alphabet, other = ("abcd", "vwxy") if name == "x" else ("vwxy", "abcd")
        assert len(held) == 5 and _letters(held, alphabet).all() and not _letters(held, other).any()


def _letters(samples, alphabet):
    return sum((samples == ord(letter)).sum(1) for letter in alphabet)


def test_order_of_sources_in_the_configuration_is_irrelevant(tmp_path):
    made, more = SourceConfig(kind="synthetic", num_documents=40), SourceConfig(kind="synthetic", num_documents=50)
    first = open_quietly(data_config(tmp_path, {"a": made, "b": more}))
    second = open_quietly(data_config(tmp_path, {"b": more, "a": made}))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train(range(50)), second.train(range(50)))


def test_fingerprint_tells_streams_apart(tmp_path):
    def fingerprint(seed=0, sources=None, folder=tmp_path / "cache", **overrides):
        return open_quietly(data_config(folder, sources, **overrides), seed=seed).fingerprint

    made = lambda weight: {"a": SourceConfig(kind="synthetic", num_documents=60, weight=weight),
                           "b": SourceConfig(kind="synthetic", num_documents=61)}  # fmt: skip
    different = [
        fingerprint(), fingerprint(seed=1), fingerprint(fim_rate=0.5), fingerprint(eval_fraction=0.1), fingerprint(sources=made(1.0)),
        fingerprint(sources=made(2.0)), fingerprint(tokenizer=TokenizerConfig(kind="bpe", vocab_size=300)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    # neither place nor speed is part of it, nor how the stream is cut: the phases of a run may differ in that
    assert fingerprint() == fingerprint(folder=tmp_path / "elsewhere", workers=1) == fingerprint(seq_len=S + 1)


def test_content_decides_not_where_it_lies(tmp_path, documents):
    first = open_quietly(data_config(tmp_path / "c", {"t": write_documents(tmp_path / "here", "d", documents)}))
    second = open_quietly(data_config(tmp_path / "c", {"t": write_documents(tmp_path / "there", "d", documents)}))
    changed = open_quietly(data_config(tmp_path / "c", {"t": write_documents(tmp_path / "other", "d", [*documents[:-1], "changed"])}))
    assert first.fingerprint == second.fingerprint != changed.fingerprint


def test_an_edited_file_is_read_anew(tmp_path, documents):
    source = write_documents(tmp_path / "text", "d", documents)
    before = open_quietly(data_config(tmp_path / "c", {"t": source}))
    (tmp_path / "text" / "d000.txt").write_text("now something longer than it was before " * 3)
    after = open_quietly(data_config(tmp_path / "c", {"t": source}))
    assert before.fingerprint != after.fingerprint


def test_large_vocabularies_get_wide_tokens(tmp_path):
    """Ids past 65,535 survive: a vocabulary of 70,001 words, the last one used."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({**{f"w{i}": i for i in range(70_000)}}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "w69999 w65536 w3 " * 30
    source = write_documents(tmp_path / "text", "d", [text])
    config = data_config(tmp_path / "c", {"t": source}, tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")),
                         eval_fraction=0.0)  # fmt: skip
    corpus = open_quietly(config, vocab_size=70_001)
    assert set(corpus.train([0, 1]).reshape(-1).tolist()) == {69999, 65536, 3}


def test_empty_reads(corpus):
    assert corpus.train([]).shape == corpus.eval([]).shape == (0, S + 1)
    with pytest.raises(IndexError):
        corpus.train([-1])


def test_standard_library_is_the_default_corpus(tmp_path):
    """The whole of it would take seconds: a limited number of its files, read as Python source."""
    config = data_config(tmp_path, {"stdlib": SourceConfig(kind="stdlib", max_documents=25)}, tokenizer=TokenizerConfig(kind="bpe"))
    corpus = open_quietly(config, vocab_size=400)
    assert corpus.sources[0].documents + corpus.num_quarantined == 25
    assert corpus.tokenizer.vocab_size <= 400
    text = corpus.tokenizer.decode(corpus.train(range(300)).reshape(-1).tolist())
    assert "import" in text and "def" in text
