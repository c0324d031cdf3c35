"""In what order samples are read: a permutation and a mixture, both computed, never stored.

`FeistelPermutation` shuffles [0, n) in O(1) memory, so a position in the training stream is one integer, whatever the world size.
`Mixture` says which source a global sample index reads, and which of that source's samples, so that every prefix has the right shares.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_SHARE_BITS = 24  # shares are multiples of 2^-24; indices below 2^39 then fit int64 products
MAX_SAMPLES = 1 << (63 - _SHARE_BITS)


class FeistelPermutation:
    """A keyed bijection of [0, n), for 1 <= n < 2^62.

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) on pairs (left, right) of
    Z_a x Z_b with a*b just above n; results outside [0, n) are permuted again until they fall inside ("cycle walking").
    """

    def __init__(self, n: int, key: int):
        if not 1 <= n < 1 << 62:
            raise ValueError(f"n = {n}: a permutation needs 1 <= n < 2^62")
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        digest = hashlib.blake2b(str(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, x) -> np.ndarray:
        """Images of an int64 array of indices in [0, n), elementwise, int64."""
        return self._walk(x, self._forward)

    def inverse(self, y) -> np.ndarray:
        """The indices whose images are `y`."""
        return self._walk(y, self._backward)

    def _walk(self, x, step) -> np.ndarray:
        x = np.asarray(x, dtype=np.int64)
        if x.size and not (x.min() >= 0 and x.max() < self.n):
            raise IndexError(f"indices from {x.min()} to {x.max()} do not lie in [0, {self.n})")
        y = step(x.ravel())
        while (outside := np.flatnonzero(y >= self.n)).size:
            y[outside] = step(y[outside])
        return y.reshape(x.shape)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for i in range(_ROUNDS):
            if i % 2 == 0:
                left = (left + _mix(right, self._round_keys[i], self._a)) % self._a
            else:
                right = (right + _mix(left, self._round_keys[i], self._b)) % self._b
        return left * self._b + right

    def _backward(self, y: np.ndarray) -> np.ndarray:
        left, right = np.divmod(y, self._b)
        for i in reversed(range(_ROUNDS)):
            if i % 2 == 0:
                left = (left - _mix(right, self._round_keys[i], self._a)) % self._a
            else:
                right = (right - _mix(left, self._round_keys[i], self._b)) % self._b
        return left * self._b + right


def _mix(x: np.ndarray, key: np.uint64, modulus: int) -> np.ndarray:
    """A pseudo-random function of x into [0, modulus): splitmix64's finaliser (Steele et al., 2014)."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)


class Mixture:
    """Deals global sample indices to sources by weight, evenly: no prefix is off by more than about log2(sources) samples.

    A balanced tree over the sources; each node deals its indices to its two sides like Bresenham's line (index g goes left when
    floor(g * share + 1/2) steps), so the number dealt left before g has a closed form and any index is found without a state.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights or not all(w > 0 and math.isfinite(w) for w in weights):
            raise ValueError(f"weights {list(weights)} must be positive, and at least one")
        self._weights = [float(w) for w in weights]

    def __call__(self, index) -> tuple[np.ndarray, np.ndarray]:
        """(source, index within that source) of each global sample index in [0, 2^39), two int64 arrays of its shape."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and not (index.min() >= 0 and index.max() < MAX_SAMPLES):
            raise IndexError(f"sample indices from {index.min()} to {index.max()} do not lie in [0, {MAX_SAMPLES})")
        flat = index.ravel()
        source, within = np.zeros_like(flat), flat.copy()
        self._deal(within, source, np.arange(flat.size), 0, len(self._weights))
        return source.reshape(index.shape), within.reshape(index.shape)

    def _deal(self, within: np.ndarray, source: np.ndarray, rows: np.ndarray, low: int, high: int) -> None:
        if high - low == 1 or not rows.size:
            source[rows] = low
            return
        middle = (low + high) // 2
        share = self._share(low, middle, high)
        g = within[rows]
        before, after = (g * share + _HALF) >> _SHARE_BITS, ((g + 1) * share + _HALF) >> _SHARE_BITS
        left = after > before
        within[rows] = np.where(left, before, g - before)
        self._deal(within, source, rows[left], low, middle)
        self._deal(within, source, rows[~left], middle, high)

    def _share(self, low: int, middle: int, high: int) -> int:
        """Of the left side, in units of 2^-24; neither side is ever starved."""
        left, total = math.fsum(self._weights[low:middle]), math.fsum(self._weights[low:high])
        return min(max(round(left / total * (1 << _SHARE_BITS)), 1), (1 << _SHARE_BITS) - 1)


_HALF = 1 << (_SHARE_BITS - 1)
