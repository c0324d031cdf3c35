"""What one rank's memory holds at its fullest in a training step, and where in the schedule that is.

Pure functions of the configuration: the rank's own list of actions is walked with the bytes of each phase (`moments.py`) beside weights,
gradients and optimizer state (`cost.py`). What an allocator cannot use between blocks is an allowance, FRAGMENTATION.
"""

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..conf.schema import ClusterConfig, Config
from ..kernels.grouped import row_alignment
from ..kernels.row_maps import rows_bound
from ..parallel.dispatch.deepep import buffer_bytes
from ..parallel.schedule import SCHEDULES, Action, Op
from . import cost
from .moments import Exchange, Micro, Phase
from .owned import owned, update_bytes
from .rank_share import Share, is_routed, rank_actions, rank_share
from .traffic import reached

LOSSES = Phase("losses", kept=0.0, out=0.0, forward=0.0, grad=0.0, backward=0.0)  # a turn of the executor's, and hardly a byte
FRAGMENTATION = 0.04  # of all that is allocated: an allowance, not a measurement


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step. `peak_at`: the action, and the phase that runs."""

    weights: int
    main_grads: int
    optimizer: int
    casts: int
    activations: int  # kept for backward, closures of weight gradients among them, and the step's tokens
    working: int  # what the phase that runs needs beside
    exchange: int  # rows of token exchanges on their way
    pipeline: int  # buffers of what neighbours are to send, and results that wait for another stage of this rank
    fragmentation: int
    host: int  # in the host's memory; not in `total`
    peak_at: str

    @property
    def allocated(self) -> int:
        """What tensors take."""
        parts = (self.weights, self.main_grads, self.optimizer, self.casts, self.activations, self.working, self.exchange, self.pipeline)
        return sum(parts)

    @property
    def total(self) -> int:
        return self.allocated + self.fragmentation


def fits(memory: Memory, cluster: ClusterConfig) -> bool:
    return memory.total <= cluster.memory_gb * 1e9


def rank_memory(
    config: Config, pp_rank: int, *, place: tuple[int, int] | None = None, imbalance: float = 1.0, padded_values: bool = False,
    sends_stay: bool = False, num: int | None = None,
) -> Memory:  # fmt: skip
    """Of a rank in that place of the pipeline, at `place` (edp rank, ep rank) in it; None: as any there, and no step of the optimizer has
    the peak. `imbalance`: rows that its experts get, in every exchange, over the mean.

    As on CPU: `padded_values` (`moments.Micro`), and with `sends_stay`, what gloo has sent stays until somebody waits for it. `num`:
    micro-batches of the step; None: of the full batch.
    """
    share = rank_share(config, pp_rank)
    state = cost.rank_state_bytes(
        config, layers=share.layers, embedding=share.has_first, head=share.has_last, copies=len(share.alike), end_copies=len(share.ends)
    )
    num = config.num_micro_batches if num is None else num
    micro = micro_of(config, imbalance=imbalance, padded_values=padded_values)
    walk = _Walk(micro, _stages(config, share, micro), share, sends_stay)
    peak = walk.run(rank_actions(config, pp_rank, num if sends_stay else min(num, _enough(config))))
    optimizer = state.optimizer
    if place is not None:
        mine = owned(config, share, edp_rank=place[0], ep_rank=place[1])
        optimizer, update = cost.owned_bytes(config, mine.numel, mine.numel_by_muon), update_bytes(config, mine)
        if update > peak.total:
            peak = Peak(update, 0.0, 0.0, 0.0, "optimizer")
    tokens = num * micro.tokens * 8 * 2  # inputs and targets
    wire = _wire(config, share)
    allocated = state.total - state.optimizer + optimizer + tokens + wire + peak.total
    return Memory(
        weights=state.weights,
        main_grads=state.main_grads,
        optimizer=optimizer,
        casts=state.casts,
        activations=round(peak.kept) + tokens,
        working=round(peak.total - peak.kept - peak.travelling - peak.pipeline),
        exchange=round(peak.travelling) + wire,
        pipeline=round(peak.pipeline),
        fragmentation=round(FRAGMENTATION * allocated),
        host=state.host,
        peak_at=peak.where,
    )


def _wire(config: Config, share: Share) -> int:
    """Buffers that an exchange has for as long as the run."""
    p, m = config.parallel, config.model
    if p.dispatcher != "deepep" or not any(is_routed(m, layer) for layer in share.layers):
        return 0
    return sum(buffer_bytes(p.ep, m.dim * 2, min(p.ep, config.cluster.gpus_per_node)))


def _enough(config: Config) -> int:
    """Micro-batches in which a schedule holds the most that it ever does; as many as two stages' worth, and two more, or what it wants."""
    p = config.parallel
    return next(n for n in itertools.count(2 * p.num_stages + 2) if SCHEDULES[p.schedule].rule(p.pp, p.chunks, n) is None)


# ---------------------------------------------------------------- the rank's phases


def micro_of(config: Config, *, imbalance: float = 1.0, padded_values: bool = False) -> Micro:
    m, p = config.model, config.parallel
    tokens, fp8 = config.train.micro_batch_sequences * config.data.seq_len, config.precision.linear == "fp8"
    align = row_alignment(torch.bfloat16 if config.precision.compute == "bf16" else torch.float32, fp8=fp8)
    copies, experts = tokens * m.top_k, max(1, m.num_experts // p.ep)
    exchanged = p.ep > 1 or p.dispatcher not in ("auto", "local")
    received = imbalance * copies if exchanged else copies
    # On one rank nobody knows how many rows padding will make: there is room for the most.
    rows = experts * -(-received // (experts * align)) * align if exchanged else rows_bound(copies, experts, align)
    arrived = received + rows_bound(round(received), experts, align)  # what maps of rows that came are long
    across, sent_on, maps = None, float(copies), 8 * (2 * copies + arrived if exchanged else copies + rows)
    once = 0.0
    if p.dispatcher == "deepep":
        share = reached(m.num_experts, experts, m.top_k, m.num_groups, m.num_limited_groups)
        once = p.ep * tokens * (1 - (1 - share) ** imbalance)
        found = once * m.top_k * (1 + 8 + 8)  # which copies are here, their rows, and whose rows those are
        maps = found + tokens * p.ep + 8 * once
    elif p.dispatcher == "hierarchical":
        places = min(p.ep, config.cluster.gpus_per_node)
        nodes = p.ep // places
        far = tokens * nodes * reached(m.num_experts, m.num_experts // nodes, m.top_k, m.num_groups, m.num_limited_groups)
        across = (far, far)
        maps = 8 * (tokens * nodes + copies + far + 2 * far * m.top_k + arrived)
    return Micro(
        model=m,
        tokens=tokens,
        width=cost.ELEMENT_BYTES[config.precision.compute],
        fp8=fp8,
        recompute=frozenset(config.train.recompute),
        padded_values=padded_values,
        ep=p.ep,
        rows=rows,
        received=received,
        sent=copies,
        sent_on=sent_on,
        maps=maps + tokens * m.top_k * 8,
        across=across,
        exchanged=exchanged,
        once=once,
    )


class Stage(NamedTuple):
    """`forward` and `backward`: the same phases in their order; None where a block has no exchange."""

    forward: list[Phase | Exchange | None]
    backward: list[Phase | Exchange | None]


def _stages(config: Config, share: Share, micro: Micro) -> dict[int, Stage]:
    m, last = config.model, share.num_stages - 1
    block, made = functools.cache(lambda routed: _block(micro, routed)), {}
    for stage, layers in share.stages.items():
        phases: list[tuple] = [(embed, embed) for embed in [micro.embed()]] if stage == 0 else []
        for layer in (layer for layer in layers if layer < m.num_layers):
            phases += block(is_routed(m, layer))
        if stage == last:
            head, predict = micro.head(), micro.predict()
            phases.append((head, head))
            for layer in (layer for layer in layers if layer >= m.num_layers):
                phases += [(predict, predict), *block(is_routed(m, layer)), (head, head)]
            phases.append((LOSSES, LOSSES))
        made[stage] = Stage([f for f, _ in phases], [b for _, b in reversed(phases)])
    return made


def _block(micro: Micro, routed: bool) -> list[tuple]:
    attention = micro.attention(routed=routed)
    if not routed:
        mlp = micro.mlp()
        return [(attention, attention), (None, None), (mlp, mlp), (None, None)]
    experts = micro.experts()
    return [
        (attention, attention),
        (micro.to_experts("dispatch", weights=True), micro.to_tokens("dispatch", weights=True, out=2 * micro.D)),
        (experts, experts),
        (micro.to_tokens("combine", weights=False, out=micro.D), micro.to_experts("combine", weights=False)),
    ]


# ---------------------------------------------------------------- one op


class Stretch(NamedTuple):
    """Between two turns of the executor; bytes beside those there were before the op. `kept` (activations, and what weight gradients that
    wait hold) and `travelling` are parts of `peak`; `after` is what there is at its end."""

    peak: float
    kept: float
    travelling: float
    after: float
    where: str


class Waiting(NamedTuple):
    """Weight gradients of one phase that wait: what they hold until they have run, and what running them takes beside."""

    held: float
    running: float


class Tape:
    """Stretches of an op, told in the order of its phases. `values`: what one phase hands to the next. `others`: weight gradients of
    earlier ops, oldest first, that may run under exchanges of this one; None where something else does."""

    def __init__(self, kind: str, values: float, others: Sequence[Waiting] | None = None):
        self.kind, self.values, self.kept, self.flight = kind, values, 0.0, 0.0
        self.fills, self.others, self.freed = others is not None, deque(others or ()), 0.0
        self.closures: deque[Waiting] = deque()  # own
        self.stretches: list[Stretch] = []
        self.most = Stretch(0.0, 0.0, 0.0, 0.0, "")

    @property
    def held(self) -> float:
        return self.kept + sum(waiting.held for waiting in self.closures) - self.freed

    def at(self, where: str, temporary: float = 0.0, travelling: float = 0.0) -> None:
        peak = self.held + self.values + self.flight + temporary + travelling
        if peak > self.most.peak or not self.most.where:
            self.most = Stretch(peak, self.held, self.flight + travelling, 0.0, f"{where} {self.kind}")

    def cut(self) -> None:
        self.stretches.append(self.most._replace(after=self.held + self.values + self.flight))
        self.most = Stretch(0.0, 0.0, 0.0, 0.0, "")

    def run_closures(self) -> None:
        """Under an exchange: a B's own, all; else the oldest of those that wait, unless there is another op to run."""
        if self.kind == "B" and self.closures:
            self.at("weight gradients", max(waiting.running for waiting in self.closures))
            self.closures.clear()
        elif self.kind != "B" and self.fills and (self.others or self.closures):
            oldest = (self.others or self.closures)[0]
            self.at("weight gradients", oldest.running)
            self.freed += oldest.held if self.others else 0.0
            (self.others or self.closures).popleft()

    def exchange(self, e: Exchange | None) -> None:
        if e is None:
            if self.kind == "B":
                self.run_closures()
            self.at("nothing,")
            return self.cut()
        self.at(e.name, travelling=e.packing)
        self.flight = e.flight
        self.run_closures()
        self.at(e.name)
        self.cut()
        if e.onward:
            self.at(e.name, travelling=e.onward)
            self.run_closures()
        self.at(e.name, travelling=e.landing)
        self.flight, self.values = 0.0, e.out if e.adds else self.values + e.out

    def compute(self, p: Phase) -> None:
        forward = self.kind == "F"
        self.at(p.name, p.forward if forward else p.backward)
        self.kept += p.kept if forward else -p.kept
        self.values = p.out if forward else p.grad
        if not forward and p is not LOSSES:
            self.closures.append(Waiting(p.held, p.running))
        self.at(p.name)
        self.cut()


class Run(NamedTuple):
    """An op's stretches, and what stays when it is over: of activations (less, after a backward), and of weight gradients that wait.
    `filled`: how many of other ops' have run."""

    stretches: list[Stretch]
    kept: float
    closures: list[Waiting]
    filled: int


def _run(stage: Stage, kind: str, values: float, others: Sequence[Waiting] | None = None) -> Run:
    """`kind`: F, B or I. `values`: what it is handed. `others`: as in `Tape`."""
    tape = Tape(kind, values, others)
    for phase in stage.forward if kind == "F" else stage.backward:
        tape.compute(phase) if isinstance(phase, Phase) else tape.exchange(phase)
    if kind == "B" and tape.closures:
        tape.run_closures()
        tape.cut()
    return Run(tape.stretches, tape.kept, list(tape.closures), len(others or ()) - len(tape.others))


def _together(runs: Sequence[Run]) -> Stretch:
    """The fullest moment of an action: its ops take turns, stretch by stretch, the first of `runs` first."""
    best, state = None, [0.0] * len(runs)
    kept = [0.0] * len(runs)
    for turn in range(max(len(run.stretches) for run in runs)):
        for i, run in enumerate(runs):
            if turn < len(run.stretches):
                s, others = run.stretches[turn], sum(state) - state[i]
                if best is None or s.peak + others > best.peak:
                    best = s._replace(peak=s.peak + others, kept=s.kept + sum(kept) - kept[i])
                state[i], kept[i] = s.after, s.kept
    return best


# ---------------------------------------------------------------- the schedule


class Peak(NamedTuple):
    total: float
    kept: float
    travelling: float
    pipeline: float
    where: str


class _Walk:
    """Through a rank's list, with what is kept, what waits, and what is yet to come."""

    def __init__(self, micro: Micro, stages: dict[int, Stage], share: Share, sends_stay: bool):
        self.micro, self.share, self.sends_stay = micro, share, sends_stay
        self.last, self.D = share.num_stages - 1, micro.D
        values = lambda kind, stage: self.D * (stage > 0 if kind == "F" else stage < self.last)
        self.runs = functools.cache(lambda kind, stage, *others: _run(stages[stage], kind, values(kind, stage), *others))
        self.pair = functools.cache(lambda ops: _together([self.runs(*op) for op in reversed(ops)]))
        legs = 2 if micro.across else 1
        self.legs = {s: legs * sum(isinstance(p, Exchange) for p in stage.forward) * micro.exchanged for s, stage in stages.items()}

    def run(self, actions: Sequence[Action]) -> Peak:
        kept, waits, best = 0.0, 0.0, Peak(-1.0, 0, 0, 0, "")
        self.deferred: dict[tuple[int, int], deque[Waiting]] = {}
        for action, upcoming in zip(actions, (*actions[1:], ())):
            waits -= self.D * sum(self._from_here(op) for op in action)
            coming = self.D * sum(self._receives(op) for op in upcoming)
            runs, stretch = self._fullest(action)
            closures = sum(waiting.held for of_op in self.deferred.values() for waiting in of_op)
            total = kept + closures + waits + coming + stretch.peak
            if total > best.total:
                where = "+".join(f"{op.stage}{op.kind}{op.micro_batch}" for op in action)
                best = Peak(total, kept + closures + stretch.kept, stretch.travelling, waits + coming, f"{where}: {stretch.where}")
            for op, run in zip(action, runs):
                kept += self._over(op, run)
            waits += self.D * sum(self._to_here(op) for op in action)
        return best

    def _fullest(self, action: Action) -> tuple[list[Run | None], Stretch]:
        """What the ops of an action do (None: weight gradients alone), and the fullest moment."""
        if action[0].kind == "W":
            (op,) = action
            running = max((waiting.running for waiting in self.deferred[op.stage, op.micro_batch]), default=0.0)
            return [None], Stretch(running, 0.0, 0.0, 0.0, "weight gradients W")
        if len(action) == 1 and action[0].kind != "B" and self.legs[action[0].stage]:
            (op,) = action
            waiting = (w for of_op in self.deferred.values() for w in of_op)
            run = self.runs(op.kind, op.stage, tuple(itertools.islice(waiting, self.legs[op.stage])))
            return [run], _together([run])
        return [self.runs(op.kind, op.stage) for op in action], self.pair(tuple((op.kind, op.stage) for op in action))

    def _over(self, op: Op, run: Run | None) -> float:
        """What of activations an op leaves, or frees."""
        key = (op.stage, op.micro_batch)
        if run is None:
            self.deferred.pop(key)
            return 0.0
        for _ in range(run.filled):
            next(of_op for of_op in self.deferred.values() if of_op).popleft()
        if op.kind == "I":
            self.deferred[key] = deque(run.closures)
        sent = 0.0
        if self.sends_stay:
            if op.kind == "F":
                sent = self.D * (op.stage < self.last and not self._to_here(op))
            else:  # what forward sent has been answered; what goes back now is not
                ours = op._replace(kind="F")
                sent = self.D * (op.stage > 0 and not self._to_here(op)) - self.D * (op.stage < self.last and not self._to_here(ours))
        return run.kept + sent

    def _next(self, op: Op) -> int:
        return op.stage + (1 if op.kind == "F" else -1)

    def _holder_here(self, stage: int) -> bool:
        return stage in self.share.stages and len(self.share.placements) == 1

    def _to_here(self, op: Op) -> bool:
        """Whether the op's result is for another stage of this rank: a schedule of one direction has such."""
        return op.kind != "W" and self._holder_here(self._next(op))

    def _from_here(self, op: Op) -> bool:
        source = op.stage + (-1 if op.kind == "F" else 1)
        return op.kind != "W" and self._holder_here(source)

    def _receives(self, op: Op) -> bool:
        source = op.stage + (-1 if op.kind == "F" else 1)
        return op.kind != "W" and 0 <= source <= self.last and not self._holder_here(source)
