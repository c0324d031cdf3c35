"""Gradients computed twice, by different ranks: what a device gets wrong without a word shows as a difference, be it one bit of a sum.

In every `guard.replay_interval`-th step each team (the ranks of one expert-data-parallel place) first computes the next one's:

    team         0     1     2
    replays      1's   2's   0's     thrown away, all but what their bits add up to
    then its own                     summed over replicas once theirs has been added up, too
    if any differ, the step again
    replays      2's   0's   1's     who is wrong is in all pairs that differ; of two teams, nobody can tell
    ... and again, where that is not clear
    replays      0's   1's   2's     who does not even agree with itself

A rank takes the place of the one of the same stages and the same experts: with the same weights, and the same place in every exchange, it
must find the same bits. One team has but itself: a fault that passes shows, one that stays may come twice alike.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..conf.schema import ParallelConfig
from .signals import Heard

Pair = tuple[int, int]  # a rank, and the one whose gradients it found other than that one did


class WrongGradients(Exception):
    """A rank computes wrongly, and not once only."""


class Replay:
    """Of one layout; alike on all ranks. `exact`: what is computed twice is the same bits, as on CPUs. Of GPUs that is not known, and
    where most ranks differ from themselves it is their kernels: then no step is replayed any more."""

    def __init__(self, parallel: ParallelConfig, interval: int, *, exact: bool):
        self.parallel, self.interval, self.exact = parallel, interval, exact
        self._sound = 0  # the last step whose replay agreed, 1 is the run's first; 0: none

    def ahead(self, step: int, tries: Sequence[Sequence[Pair]]) -> int | None:
        """How many teams ahead of its own is that which each team replays in step `step` (1 is the first) after these tries; None: no
        replay."""
        if not self.interval or step % self.interval:
            return None
        teams = self.parallel.edp
        return (1, 2 if teams > 2 else 1, 0)[len(tries)] % teams

    def differ(self, ahead: int, heard: Heard) -> list[Pair]:
        """Which ranks did not find what those found whose micro-batches they replayed."""
        p, own, replayed = self.parallel, heard.each["own"], heard.each["replayed"]
        of = lambda rank: rank - rank % p.dp + (rank % p.dp + ahead * p.ep) % p.dp
        return [(rank, of(rank)) for rank in range(p.world_size) if replayed[rank] != own[of(rank)]]

    def judge(self, step: int, tries: Sequence[Sequence[Pair]]) -> tuple[bool, str]:
        """(whether the step is to be computed once more, what to tell if anything) after these tries at it, the last of which is new.
        Raises WrongGradients."""
        first, last = tries[0], tries[-1]
        if not last and len(tries) < 3:
            self._sound = step
            return False, f"{_sentence(first)}; computed again, they are alike: a passing fault" if first else ""
        if len(tries) == 1:
            return True, ""
        suspects, alone = self._suspects([*tries[0], *tries[1]]), self.parallel.edp == 1
        if len(tries) == 2 and not alone and (len({self._team(rank) for rank in suspects}) > 1 or not self.exact):
            return True, ""
        odd = sorted({rank for rank, _ in last}) if alone or len(tries) == 3 else []  # differ from themselves
        if not self.exact and 2 * len(odd) > self.parallel.world_size:
            self.interval = 0
            return False, f"the kernels of this device do not give the same bits twice ({_sentence(last)}): no step is replayed any more"
        raise WrongGradients(self._verdict(step, first, odd or suspects))

    def _team(self, rank: int) -> int:
        return rank % self.parallel.dp // self.parallel.ep

    def _suspects(self, pairs: Sequence[Pair]) -> list[int]:
        """The ranks in these pairs of the team that is in all of them; or all, where no team is, or two are."""
        teams = set.intersection(*({self._team(rank) for rank in pair} for pair in pairs))
        ranks = {rank for pair in pairs for rank in pair}
        return sorted(rank for rank in ranks if self._team(rank) in teams or not teams)

    def _verdict(self, step: int, pairs: Sequence[Pair], ranks: Sequence[int]) -> str:
        named = f"rank {' or '.join(map(str, ranks))}"
        which = f"Checkpoints after step {self._sound}, whose replay agreed," if self._sound else "All checkpoints"
        return (
            f"step {step}: {_sentence(pairs)}, and not once only: {named} computes wrongly. No weight was changed by it. Take the device "
            f"of {named} out, or test it. {which} may hold what it had got wrong before: go on from an older one "
            "(shoestring checkpoint list; checkpoint.resume=PATH)"
        )

    # ------------------------------------------------------------ in a checkpoint

    def state(self) -> dict:
        return {"replay_agreed": self._sound}

    def load_state(self, extra: dict) -> None:
        self._sound = extra.get("replay_agreed", 0)


def _sentence(pairs: Sequence[Pair]) -> str:
    said = [f"rank {rank} found other gradients than rank {of} of the same samples" for rank, of in pairs if rank != of]
    said += [f"rank {rank} found other gradients of the same samples the second time" for rank, of in pairs if rank == of]
    return "; ".join(said[:4]) + (f"; and {len(said) - 4} more" if len(said) > 4 else "")


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits each time, where a GPU has them: sums there are in whatever order threads come, otherwise."""
    if device.type == "cpu":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills
