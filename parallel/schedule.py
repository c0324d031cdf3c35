"""Pipeline schedules as data: which rank holds which stage, and each rank's list of actions for one optimizer step.

The same lists feed the executor, the simulator and the Gantt chart. A schedule is one entry of `SCHEDULES`; to add one, write the two
functions and the entry: `validate` proves the lists, and the executor runs them.

An action is one op, or a pair that the executor overlaps. Ops: F forward, B full backward, I input gradients only, W the weight
gradients that an I left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..conf.errors import most_like
from ..conf.phases import levels
from ..conf.schema import Config, ConfigError, choose
from ._torch import get_schedule_ops


class Op(NamedTuple):
    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Action = tuple[Op, ...]
Placements = tuple[tuple[int, ...], ...]


def direction_of(micro_batch: int, num: int, directions: int) -> int:
    """Which of a schedule's placements micro-batch `micro_batch` of `num` runs through: equal shares, in order."""
    return micro_batch * directions // num


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`actions(pp, chunks, M)`: each rank's list. `rule(pp, chunks, M)`: None, or (field, rule, nearest) that its layout breaks."""

    place: Callable[[int, int], Placements]  # (pp, chunks) -> pipeline rank of each stage, for each direction
    actions: Callable[[int, int, int], list[list[Action]]]
    rule: Callable[[int, int, int], tuple[str, str, int] | None]
    bubble: Callable[[int, int, int], float]  # idle share of a step with equal stages, backward = 2 x forward


def _one_f_one_b(pp: int, chunks: int, num: int) -> list[list[Action]]:
    """Rank r runs pp - r forwards ahead, then one backward per forward: backward i follows forward i + (pp - 1 - r)."""
    lists = []
    for rank in range(pp):
        ops = [Op(kind, rank, i) for kind in "FB" for i in range(num)]
        ops.sort(key=lambda op: (op.micro_batch + (pp - 1 - op.stage) * (op.kind == "B"), op.kind == "B"))
        lists.append([(op,) for op in ops])
    return lists


def _interleaved(pp: int, chunks: int, num: int) -> list[list[Action]]:
    """torch's list (checked by `validate`; its 1F1B list is not right, hence ours above)."""
    lists = get_schedule_ops("Interleaved1F1B", pp, num, num_stages_per_rank=chunks)
    kinds = {"F": "F", "B": "B", "I": "I", "W": "W"}
    return [[(Op(kinds[a.computation_type.value], a.stage_index, a.microbatch_index),) for a in ops if a is not None] for ops in lists]


def _no_chunks(pp: int, chunks: int, num: int):
    return ("parallel.chunks", "schedule 1f1b runs one stage per rank", 1) if chunks != 1 else None


def _rounds(pp: int, chunks: int, num: int):
    if chunks < 2:
        return "parallel.chunks", "an interleaved schedule needs at least two stages per rank", 2
    rounds = max(1, num // pp)
    if num % rounds:
        return "micro_batches", f"interleaved_1f1b wants micro-batches per step in {rounds} equal rounds", max(1, num // pp) * pp
    return None


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(
        place=lambda pp, chunks: (tuple(range(pp)),),
        actions=_one_f_one_b,
        rule=_no_chunks,
        bubble=lambda pp, chunks, num: (pp - 1) / (num + pp - 1),
    ),
    "interleaved_1f1b": Schedule(
        place=lambda pp, chunks: (tuple(range(pp)) * chunks,),
        actions=_interleaved,
        rule=_rounds,
        bubble=lambda pp, chunks, num: (pp - 1) / (chunks * num + pp - 1),
    ),
}


def check(config: Config) -> None:
    """Raises ConfigError if the schedule is unknown, or does not fit the layout and the number of micro-batches of any step (of one
    phase: a configuration without phases of its own)."""
    p, unit = config.parallel, config.parallel.dp * config.train.micro_batch_sequences * config.data.seq_len
    choose("parallel.schedule", p.schedule, tuple(SCHEDULES))
    batches = [level.batch_tokens for level in levels(config.train)]
    for tokens in batches:
        broken = SCHEDULES[p.schedule].rule(p.pp, p.chunks, tokens // unit)
        if broken is None:
            continue
        field, rule, nearest = broken
        if field != "micro_batches":
            raise ConfigError(field, getattr(p, field.split(".")[1]), rule, nearest)
        rule += f", and {tokens} tokens a step make {tokens // unit} of them"
        if len(batches) == 1:
            raise ConfigError("train.global_batch_tokens", tokens, rule, nearest * unit)
        raise ConfigError("parallel.schedule", p.schedule, f"{rule} (train.ramp)", _schedule_for(config, [n // unit for n in batches]))


def _schedule_for(config: Config, nums: list[int]) -> str | None:
    """The schedule most like the one asked for whose rule all these numbers of micro-batches obey, as the layout is or with one chunk."""
    p = config.parallel
    fitting = [name for name, s in SCHEDULES.items() if any(all(s.rule(p.pp, chunks, n) is None for n in nums) for chunks in (p.chunks, 1))]
    return most_like(p.schedule, fitting) if fitting else None


def validate(lists: Sequence[Sequence[Action]], placements: Placements, num: int) -> None:
    """Raises ValueError unless each stage runs every micro-batch forward and backward once, on its rank, in an order that can finish."""
    ops, num_stages = {}, len(placements[0])
    for rank, actions in enumerate(lists):
        for op in (op for action in actions for op in action):
            if op in ops:
                raise ValueError(f"{op} stands twice in the lists")
            if not (0 <= op.stage < num_stages and 0 <= op.micro_batch < num):
                raise ValueError(f"rank {rank} is to run {op}: there are stages 0 to {num_stages - 1} and micro-batches 0 to {num - 1}")
            if placements[direction_of(op.micro_batch, num, len(placements))][op.stage] != rank:
                raise ValueError(f"rank {rank} is to run {op}, whose stage it does not hold")
            ops[op] = rank
    for stage in range(num_stages):
        for i in range(num):
            kinds = "".join(k for k in "FBIW" if Op(k, stage, i) in ops)
            if kinds not in ("FB", "FIW"):
                raise ValueError(f"stage {stage}, micro-batch {i} has {kinds or 'no'} actions: want F and B, or F, I and W")
    _play(lists, num_stages)


def _play(lists: Sequence[Sequence[Action]], num_stages: int) -> None:
    done: set[Op] = set()

    def ready(op: Op) -> bool:
        s, i = op.stage, op.micro_batch
        if op.kind == "F":
            return s == 0 or Op("F", s - 1, i) in done
        if op.kind == "W":
            return Op("I", s, i) in done
        later = s == num_stages - 1 or Op("B", s + 1, i) in done or Op("I", s + 1, i) in done
        return later and Op("F", s, i) in done

    waiting = [list(actions) for actions in lists]
    while any(waiting):
        moved = False
        for actions in waiting:
            while actions and all(ready(op) for op in actions[0]):
                done.update(actions.pop(0))
                moved = True
        if not moved:
            stuck = ", ".join(f"rank {r} at {'+'.join(map(str, a[0]))}" for r, a in enumerate(waiting) if a)
            raise ValueError(f"the lists cannot finish: {stuck}")


def split_layers(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Contiguous shares of the layers, at least one each, whose dearest stage is cheapest.

    `costs`: of each layer, in any unit; `first` and `last`: what the ends cost beside their layers.
    """
    n = len(costs)
    assert 1 <= num_stages <= n
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, a: int, b: int) -> float:
        return sums[b] - sums[a] + (first if stage == 0 else 0.0) + (last if stage == num_stages - 1 else 0.0)

    # best[b]: (dearest stage, cut points) of the first b layers over the stages so far; ties keep earlier stages shorter
    best = {b: (cost_of(0, 0, b), [0, b]) for b in range(1, n - num_stages + 2)}
    for stage in range(1, num_stages):
        best = {
            b: min(((max(worst, cost_of(stage, a, b)), [*cuts, b]) for a, (worst, cuts) in best.items() if a < b), key=lambda t: t[0])
            for b in range(stage + 1, n - (num_stages - 1 - stage) + 1)
        }
    cuts = best[n][1]
    return [range(a, b) for a, b in pairwise(cuts)]
