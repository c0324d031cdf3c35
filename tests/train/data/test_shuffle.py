"""The order of samples: bijections at every size, shares at every prefix."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shoestring.train.data.shuffle import MAX_SAMPLES, FeistelPermutation, Mixture

V3_SAMPLES = 14_800_000_000_000 // 4096  # 3.6 billion: past int32


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64))
@example(n=1, key=0)  # nothing to shuffle
@example(n=2, key=0)  # a side of the Feistel square has one element
@example(n=2500, key=0)  # a square: no index walks
@example(n=2501, key=0)  # one past a square
def test_every_index_comes_once(n, key):
    permutation = FeistelPermutation(n, key)
    image = permutation(np.arange(n))
    assert sorted(image.tolist()) == list(range(n))
    assert permutation.inverse(image).tolist() == list(range(n))


@pytest.mark.parametrize("n", [V3_SAMPLES, 2**32 - 1, 2**61 + 7])  # the recipe's; the edge of 32 bits; the edge of the class
def test_huge_permutations_are_distinct_and_invertible(n):
    permutation = FeistelPermutation(n, "seed/0/web/0")
    rng = np.random.default_rng(0)
    index = np.unique(np.concatenate([rng.integers(0, n, 200_000), np.arange(100_000), n - 1 - np.arange(100_000)]))
    image = permutation(index)
    assert image.dtype == np.int64 and image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)
    assert np.array_equal(permutation.inverse(image), index)


def test_neighbours_are_scattered_evenly():
    # 100,000 consecutive indices into 1,000 equal bins of 3.6 billion: chi-square has mean 999 and deviation 45.
    image = FeistelPermutation(V3_SAMPLES, 7)(np.arange(100_000))
    counts = np.bincount(image * 1000 // V3_SAMPLES, minlength=1000)
    assert 999 - 6 * 45 < ((counts - 100) ** 2 / 100).sum() < 999 + 6 * 45
    assert abs(np.corrcoef(image[:-1].astype(float), image[1:].astype(float))[0, 1]) < 0.02


def test_keys_give_unrelated_orders_and_equal_keys_equal_ones():
    first, other, again = (FeistelPermutation(10_000, key)(np.arange(10_000)) for key in ("a", "b", "a"))
    assert np.array_equal(first, again)
    assert (first == other).sum() < 10  # one expected by chance
    assert not np.array_equal(first, np.arange(10_000))


def test_shape_is_kept_and_strangers_refused():
    permutation = FeistelPermutation(10, 0)
    assert permutation(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation(np.array([], dtype=np.int64)).size == 0
    for stranger in (-1, 10):
        with pytest.raises(IndexError):
            permutation(np.array([stranger]))
    with pytest.raises(ValueError):
        FeistelPermutation(0, 0)


weight_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(weights=weight_lists)
@settings(max_examples=60)
def test_mixture_has_the_right_share_in_every_prefix(weights):
    source, within = Mixture(weights)(np.arange(2000))
    depth = math.ceil(math.log2(len(weights))) if len(weights) > 1 else 0
    for k, weight in enumerate(weights):
        mine = source == k
        assert within[mine].tolist() == list(range(mine.sum()))  # each source in its own order, none lost, none repeated
        wanted = np.arange(1, 2001) * weight / sum(weights)
        assert np.abs(np.cumsum(mine) - wanted).max() <= 0.5 * depth + 0.51


@given(weights=weight_lists, start=st.integers(0, MAX_SAMPLES - 500))
def test_mixture_is_random_access(weights, start):
    mixture = Mixture(weights)
    index = np.arange(start, start + 400)
    source, within = mixture(index)
    one_by_one = [mixture(np.array([i])) for i in index[::37]]
    assert [(s[0], w[0]) for s, w in one_by_one] == list(zip(source[::37], within[::37]))
    for k in range(len(weights)):  # consecutive in its source, wherever the stream is entered
        mine = within[source == k]
        assert np.array_equal(mine, np.arange(len(mine)) + (mine[0] if len(mine) else 0))


def test_mixture_refuses_nonsense():
    for weights in ([], [0.0, 1.0], [float("nan")], [-1.0]):
        with pytest.raises(ValueError):
            Mixture(weights)
    with pytest.raises(IndexError):
        Mixture([1.0])(np.array([-1]))
