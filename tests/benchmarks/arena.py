"""How contestants are timed: in interleaved pairs, because a machine's speed drifts by more within the hour than what is to be told apart.

A duel alternates one step of each side, on the same tokens, and takes the ratio of each pair. Its steps are collective where there are
several ranks; rank 0's clock counts, on every rank, so that all ranks take the same decisions.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from peers import SEQ_LEN, SEQUENCES, Contestant, Variant
from torch import Tensor

TOKENS = SEQUENCES * SEQ_LEN
PROBE_PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A variant with the micro-batch, in sequences, that it trains in."""

    variant: Variant
    micro: int

    def __str__(self) -> str:
        return f"{self.variant.name} ({self.micro})"


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Seconds of each side's step in each pair."""

    ours: Entry
    theirs: Entry
    seconds: list[tuple[float, float]]

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Quartiles of their time over ours: above 1, our side is faster."""
        return tuple(statistics.quantiles([b / a for a, b in self.seconds], n=4, method="inclusive"))

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        return tuple(TOKENS / statistics.median(side) for side in zip(*self.seconds))


class Arena:
    """Makes contestants and lets them meet. `make(variant, micro)` is collective, like everything here."""

    def __init__(self, make: Callable[[Variant, int], Contestant], *, vocab_size: int, pairs: int):
        self.make, self.vocab_size, self.pairs = make, vocab_size, pairs

    def rows(self, count: int) -> Iterator[Tensor]:
        """Global batches (B, S + 1) of random tokens, equal on all ranks; routing differs in each, as it does in training."""
        for number in range(count):
            yield torch.randint(self.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=torch.Generator().manual_seed(number))

    def losses(self, entry: Entry, steps: int) -> list[float]:
        contestant = self.make(entry.variant, entry.micro)
        return [contestant.step(rows) for rows in self.rows(steps)]

    def duel(self, ours: Entry, theirs: Entry, pairs: int | None = None) -> Duel:
        """Both from the beginning, in memory together; the first steps, in which shapes are met and code is compiled, do not count."""
        if ours.variant.compiled or theirs.variant.compiled:
            torch.compiler.reset()  # torch limits how often it compiles one function, over all the models that share it
        pairs = pairs or self.pairs
        sides = [self.make(entry.variant, entry.micro) for entry in (ours, theirs)]
        warm = 5 if ours.variant.compiled or theirs.variant.compiled else 2
        seconds = [tuple(timed(side, rows) for side in sides) for rows in self.rows(warm + pairs)]
        return Duel(ours=ours, theirs=theirs, seconds=seconds[warm:])

    def best_split(self, variant: Variant, splits: list[int]) -> Entry:
        """The variant with the faster of two micro-batch sizes; a compiled one has that of its plain self."""
        plain = Variant(library=variant.library, precision=variant.precision, experts=variant.experts)
        duel = self.duel(*(Entry(variant=plain, micro=micro) for micro in splits), pairs=PROBE_PAIRS)
        return Entry(variant=variant, micro=splits[0] if duel.ratio[1] >= 1 else splits[1])


def timed(contestant: Contestant, rows: Tensor) -> float:
    """Seconds from when all ranks are ready to when all are done, by rank 0's clock."""
    dist.barrier()
    start = perf_counter()
    contestant.step(rows)
    dist.barrier()
    seconds = torch.tensor(perf_counter() - start, dtype=torch.float64)
    dist.broadcast(seconds, 0)
    return seconds.item()
