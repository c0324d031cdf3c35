"""The schedules there are: for each, where its stages lie, its lists, the layouts it fits, and what it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...conf.errors import most_like
from ...conf.phases import levels
from ...conf.schema import Config, ConfigError, ParallelConfig, choose
from . import lists
from .ops import Action, Held, Placements
from .proof import validate
from .stages import parse_stages, split_layers

Broken = tuple[str, str, int]  # field, rule, nearest valid value


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All are functions of (pp, chunks, M), M the number of micro-batches of a step; `place` of the first two.

    `bubble` is exact for equal stages with F = 1, B = 2, I = W = 1, a pair of 3, and transfers that take no time. For anything else ask
    `timeline.simulate`.
    """

    place: Callable[[int, int], Placements]  # pipeline rank of each stage, for each direction
    actions: Callable[[int, int, int], list[list[Action]]]
    rule: Callable[[int, int, int], Broken | None]  # that such a layout breaks
    bubble: Callable[[int, int, int], float]  # idle share of a step
    held: Callable[[int, int, int], list[Held]]  # bounds, of each rank


def proven(schedule: str, pp: int, chunks: int, num: int) -> list[list[Action]]:
    """Each rank's list for a step of `num` micro-batches, validated, its bounds too."""
    s = SCHEDULES[schedule]
    made = s.actions(pp, chunks, num)
    validate(made, s.place(pp, chunks), num, s.held(pp, chunks, num))
    return made


def share_layers(p: ParallelConfig, costs: Sequence[float], *, first: float, last: float) -> list[range]:
    """The layers of each stage: as `parallel.stages` says, else shared out by cost (`split_layers`)."""
    if p.stages:
        return parse_stages(p.stages, len(costs), p.num_stages)
    placements = SCHEDULES[p.schedule].place(p.pp, p.chunks)
    holders = list(map(set, zip(*placements, strict=True)))
    return split_layers(costs, p.num_stages, first=first, last=last, mirrored=p.pp > 1 and holders == holders[::-1])


# ---------------------------------------------------------------- rules


def _one_chunk(pp: int, chunks: int, num: int) -> Broken | None:
    return ("parallel.chunks", "this schedule runs one stage per rank and direction", 1) if chunks != 1 else None


def _rounds(pp: int, chunks: int, num: int) -> Broken | None:
    if chunks < 2:
        return "parallel.chunks", "an interleaved schedule needs at least two stages per rank", 2
    rounds = max(1, num // pp)
    if num % rounds:
        return "micro_batches", f"interleaved_1f1b wants micro-batches per step in {rounds} equal rounds", max(1, num // pp) * pp
    return None


def _two_chunks(pp: int, chunks: int, num: int) -> Broken | None:
    return ("parallel.chunks", "this schedule runs two stages per rank, in a V", 2) if chunks != 2 else None


def _dualpipev(pp: int, chunks: int, num: int) -> Broken | None:
    if num < 2 * pp:
        return _two_chunks(pp, chunks, num) or ("micro_batches", "dualpipev wants as many micro-batches per step as stages", 2 * pp)
    return _two_chunks(pp, chunks, num)


def _dualpipe(pp: int, chunks: int, num: int) -> Broken | None:
    if pp % 2:
        return "parallel.pp", "dualpipe wants an even number of pipeline ranks", max(2, pp - 1)
    if num % 2 or num < 2 * pp:
        rule = f"dualpipe wants an even number of micro-batches per step, at least 2 x parallel.pp = {2 * pp}"
        return _one_chunk(pp, chunks, num) or ("micro_batches", rule, max(2 * pp, num - num % 2))
    return _one_chunk(pp, chunks, num)


# ---------------------------------------------------------------- costs


def _interleaved_held(pp: int, chunks: int, num: int) -> list[Held]:
    ahead = lambda rank: (chunks - 1) * (num // max(1, num // pp)) + 2 * (pp - 1 - rank) + 1
    return [Held(min(ahead(rank), chunks * num), 0) for rank in range(pp)]


def _v(pp: int, chunks: int) -> Placements:
    return ((*range(pp), *reversed(range(pp))),)


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(
        place=lambda pp, chunks: (tuple(range(pp)),),
        actions=lists.one_f_one_b,
        rule=_one_chunk,
        bubble=lambda pp, chunks, num: _share(pp - 1, num),
        held=lambda pp, chunks, num: [Held(min(num, pp - rank), 0) for rank in range(pp)],
    ),
    "interleaved_1f1b": Schedule(
        place=lambda pp, chunks: (tuple(range(pp)) * chunks,),
        actions=lists.interleaved_1f1b,
        rule=_rounds,
        bubble=lambda pp, chunks, num: _share(pp - 1 + (chunks - 1) * max(0, pp - num), chunks * num),
        held=_interleaved_held,
    ),
    "zbv": Schedule(
        place=_v,
        actions=lists.zbv,
        rule=_two_chunks,
        bubble=lambda pp, chunks, num: _share(max(pp - 1, 4 * (pp - 1) - 2 * (num - 1)), 6 * num),
        held=lambda pp, chunks, num: [Held(min(2 * pp, num + rank + 1, 2 * num), 2 * rank + 1) for rank in range(pp)],
    ),
    "dualpipev": Schedule(
        place=_v,
        actions=lists.dualpipev,
        rule=_dualpipev,
        bubble=lambda pp, chunks, num: _share(2 * (pp - 1), 6 * num),
        held=lambda pp, chunks, num: [Held(2 * pp + 1, rank + 1) for rank in range(pp)],
    ),
    "dualpipe": Schedule(
        place=lambda pp, chunks: (tuple(range(pp)), tuple(reversed(range(pp)))),
        actions=lists.dualpipe,
        rule=_dualpipe,
        bubble=lambda pp, chunks, num: _share(pp - 2, 3 * num),
        held=lambda pp, chunks, num: [Held(pp + 1, min(rank, pp - 1 - rank) + 1) for rank in range(pp)],
    ),
}


def _share(idle: float, busy: float) -> float:
    return idle / (idle + busy)


# ---------------------------------------------------------------- a configuration's


def check(config: Config) -> None:
    """Raises ConfigError if the schedule is unknown or does not fit the layout and the number of micro-batches of any step (of one phase:
    a configuration without phases of its own), or if the blocks of `parallel.stages` are not the model's."""
    p, unit = config.parallel, config.parallel.dp * config.train.micro_batch_sequences * config.data.seq_len
    choose("parallel.schedule", p.schedule, tuple(SCHEDULES))
    if p.stages:
        parse_stages(p.stages, config.model.num_layers, p.num_stages)
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
