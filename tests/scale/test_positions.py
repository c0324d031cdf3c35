"""Sample positions of a run of 14.8 T tokens, 3.6 billion samples and more: order, mixture, epochs, shares of ranks, and resuming there."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.phases import phases
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.parallel.relocate import Placement
from shoestring.train.checkpoint.checkpointer import Checkpointer, read_extra
from shoestring.train.data.corpus import Corpus
from shoestring.train.data.shuffle import MAX_SAMPLES, FeistelPermutation, Mixture
from shoestring.train.data.token_cache import PieceRecord
from shoestring.train.left_out import take
from shoestring.train.phase_run import PhaseRun
from shoestring.train.resume import Progress
from shoestring.train.step import Watch

LATE = 3_613_281_250  # 14.8 T tokens in samples of 4,096: past int32, uint32 at 4.3 billion is near
PLACES = (LATE, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 12_345, MAX_SAMPLES - 1)


@pytest.fixture(scope="module")
def recipe():
    return load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus]"])


def test_the_recipe_fits_the_mixture(recipe):
    samples = sum(level.num_steps * (level.batch_tokens // p.config.data.seq_len) for p in phases(recipe) for level in p.levels)
    assert 3_600_000_000 < samples < MAX_SAMPLES


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("n", [LATE, 2**31 + 11, 2**32, 2**32 + 1, (1 << 62) - 1])
def test_permutations_are_bijective(n):
    """Far places and neighbours, there and back; images of a hundred thousand places are as many."""
    order = FeistelPermutation(n, key="seed/0/files/0")
    x = np.concatenate([np.arange(100_000), n - 1 - np.arange(1000), np.random.default_rng(0).integers(0, n, 1000)])
    y = order(x)
    assert y.dtype == np.int64 and y.min() >= 0 and y.max() < n
    assert len(np.unique(y)) == len(np.unique(x))
    assert np.array_equal(order.inverse(y), x) and np.array_equal(order(order.inverse(x)), x)
    # Shuffled at all: images spread over the whole range, evenly.
    tenths = np.bincount((y[:100_000].astype(np.float64) / n * 10).astype(int), minlength=10)
    assert len(tenths) == 10 and abs(tenths - 10_000).max() < 600


def feistel(n, round_keys, x):
    """The network again, in Python's integers, which do not overflow (splitmix64's words do, by design)."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def mix(value, key, modulus):
        z = (value * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) % modulus

    while True:
        left, right = divmod(x, b)
        for i, key in enumerate(round_keys):
            if i % 2 == 0:
                left = (left + mix(right, key, a)) % a
            else:
                right = (right + mix(left, key, b)) % b
        x = left * b + right
        if x < n:
            return x


@given(n=st.integers(2**31, (1 << 62) - 1), share=st.fractions(0, 1), key=st.integers(0, 2**70))
def test_permutations_do_not_overflow(n, share, key):
    x, order = min(n - 1, int(n * share)), FeistelPermutation(n, key)
    assert int(order(x)) == feistel(n, order._round_keys.tolist(), x)


@pytest.mark.parametrize("weights", [[1], [3, 1], [0.5, 0.3, 0.2], [1e-9, 1]], ids=str)
def test_mixtures_do_not_overflow(weights):
    """Every source's samples are dealt in order, none twice and none left out, wherever one looks; shares hold."""
    mixture = Mixture(weights)
    total = Fraction(sum(map(Fraction, weights)))
    for place in PLACES:
        index = np.arange(max(0, place - 2000), min(MAX_SAMPLES, place + 2000))
        source, within = mixture(index)
        for k, weight in enumerate(weights):
            mine = within[source == k]
            assert np.array_equal(mine, np.arange(len(mine)) + (mine[0] if len(mine) else 0)), (place, k)
            if len(mine):
                # Shares are rounded to 2^-24 at each branching of the tree.
                exact = float(Fraction(weight) / total * int(index[np.flatnonzero(source == k)[0]]))
                assert abs(int(mine[0]) - exact) <= 3 + place * 2.0**-24, (place, k)
    with pytest.raises(IndexError):
        mixture([MAX_SAMPLES])


# ---------------------------------------------------------------- corpus


def _corpus(data, folder, num_tokens, seq_len):
    """A corpus of one source of `num_tokens` tokens in a file with holes, where only what `plant` writes is not zero."""
    path = folder / "0.train.bin"
    with open(path, "wb") as file:
        file.truncate(4 * num_tokens)
    (folder / "0.eval.bin").touch()
    record = PieceRecord(documents=1, bad=0, train_tokens=num_tokens, eval_tokens=0, sha256="")
    cache = SimpleNamespace(
        source=SimpleNamespace(name="files"), pieces=[None], dtype=np.dtype("<u4"),
        record=lambda p: record, path=lambda p, what: folder / f"{p}.{what}",
    )  # fmt: skip
    tokenizer = SimpleNamespace(bytes_of_id=lambda: None, fingerprint="", vocab_size=129_280)
    return Corpus(dataclasses.replace(data, seq_len=seq_len), [cache], tokenizer, seed=5, extra=1), path


def plant(path, first, tokens):
    with open(path, "r+b") as file:
        file.seek(4 * first)
        file.write(np.asarray(tokens, dtype="<u4").tobytes())


def test_samples_past_four_billion_tokens(recipe, tmp_path):
    """A source of 2^32 + 2^20 tokens, 17 GB that take no room: the sample that the permutation names is the one that is read."""
    seq_len, num_tokens = 4096, 2**32 + 2**20
    corpus, path = _corpus(recipe.data, tmp_path, num_tokens, seq_len)
    (source,) = corpus.sources
    n = source.train_samples
    assert source.train_tokens == num_tokens and n == (num_tokens - seq_len - 2) // seq_len + 1
    for epoch in (0, 1, LATE // n):
        order = FeistelPermutation(n, f"5/0/files/{epoch}")
        for place, sample in [(int(order.inverse(n - 1)), n - 1), (7, int(order(7)))]:
            tokens = [1 + (epoch + i) % 1000 for i in range(seq_len + 2)]
            plant(path, sample * seq_len, tokens)
            (row,) = corpus.train([epoch * n + place]).tolist()
            assert row == tokens, (epoch, place, sample)
            plant(path, sample * seq_len, [0] * len(tokens))
    assert (n - 1) * seq_len > 2**32


def test_an_epoch_reads_each_sample_once(recipe, tmp_path):
    """Epochs that begin past 2^32 samples, of a small source: the same samples in another order each time."""
    seq_len, n = 8, 300
    corpus, path = _corpus(recipe.data, tmp_path, n * seq_len + 2, seq_len)
    plant(path, 0, np.repeat(np.arange(n), seq_len))
    assert corpus.sources[0].train_samples == n
    first = -(-(2**32) // n) * n
    one, two = (corpus.train(np.arange(first + k * n, first + (k + 1) * n))[:, 0].tolist() for k in (0, 1))
    assert sorted(one) == sorted(two) == list(range(n)) and one != two
    assert corpus.train(range(first - 5, first))[:, 0].tolist() != one[:5]


# ---------------------------------------------------------------- shares of ranks


@pytest.mark.parametrize("first", [0, LATE, 2**32 - 1000])
def test_ranks_share_out_the_batch(recipe, first):
    """128 data-parallel ranks, 15,360 samples: each once, by one rank, in the order that any layout has."""
    constant = phases(recipe)[1]
    asked, seen = [], []

    class Seen(Watch):
        def routing(self, step, samples):
            seen.append(samples)

    def train(indices, phase):
        asked.append(indices.tolist())
        return torch.zeros(len(indices), 1)

    for dp_rank in range(128):
        run = SimpleNamespace(
            phase=constant, dp_rank=dp_rank, corpus=SimpleNamespace(train=train), engine=SimpleNamespace(watch=Seen()),
            _micro_batch=lambda rows: SimpleNamespace(rows=rows),
        )  # fmt: skip
        run._mine = partial(PhaseRun._mine, run)
        samples = take([], 0, first, constant.batch_tokens(200_000) // constant.config.data.seq_len)
        assert len(PhaseRun._read(run, 200_000, samples)) == 120
    assert all(indices == [first + i * 128 + r for i in range(120)] for r, indices in enumerate(asked))
    assert sorted(itertools.chain(*asked)) == list(range(first, first + 15_360))
    assert list(itertools.chain(*seen)) == list(itertools.chain(*asked))


# ---------------------------------------------------------------- resume


def test_resuming_at_a_late_position(tmp_path):
    """What a checkpoint keeps beside tensors comes back as the same integers, far past what a float or an int32 holds."""
    progress = Progress(step=235_240, tokens=14_800_000_000_001, samples=LATE + 1, stream=2, sample=2**53 + 1)
    extra = {"progress": dataclasses.asdict(progress), "placement_loads": [[8 * 14_800_000_000_001, 2**62 + 1]]}
    checkpointer = Checkpointer(tmp_path, keep_last=1, async_save=False)
    checkpointer.save(progress.step, {"w.master": Chunk(3, 0, torch.arange(3.0))}, extra)
    path = checkpointer.latest()
    assert path.name == "step_00235240" and read_extra(path) == extra
    loaded = checkpointer.load(path, {"w.master": Chunk(3, 0, torch.zeros(3))})
    assert Progress(**loaded["progress"]) == progress


def test_loads_since_the_last_move_of_experts(recipe):
    """Counted over a whole run without a move: 1.2e14 copies a layer, exactly, through a checkpoint's JSON."""
    config = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, placement_interval=1_000_000))
    placement = Placement(config, torch.device("cpu"))
    loads = torch.full_like(placement.loads, 14_800_000_000_001 * 8 // 256)
    loads[0, 0] += 1
    placement.after_step(loads, SimpleNamespace(steps=1), None)
    placement.after_step(loads, SimpleNamespace(steps=2), None)
    other = Placement(config, torch.device("cpu"))
    other.load_state(json.loads(json.dumps(placement.state())))
    assert torch.equal(other.loads, 2 * loads) and other.loads.dtype == torch.int64
