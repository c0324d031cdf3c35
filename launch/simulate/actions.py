"""How long each action of a rank's list takes: the executor's own order, on a clock that computes nothing.

It follows parallel/executor.py line by line: what is issued when, what runs meanwhile, what is waited for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...parallel.schedule import Action, Op
from .stage import Compute, Exchange, StageSteps

Waiting = list[tuple[float, float, float]]  # weight gradients of each phase: alone, beside an exchange, of them recomputed


@dataclass(kw_only=True)
class Clock:
    """Of one action. `compute` and `again` (recomputed) are of its `now`; the rest waited for exchanges."""

    now: float = 0.0
    compute: float = 0.0
    again: float = 0.0
    link: float = 0.0  # when the links are free again
    lateness: float = 0.0  # of the last peer, in every exchange
    exchanging: float = 0.0  # seconds of exchanges, one after another

    def run(self, seconds: float, again: float = 0.0) -> None:
        self.now += seconds
        self.compute += seconds
        self.again += again

    def issue(self, seconds: float) -> float:
        """When it will have arrived, peers' lateness included. A rank's exchanges share its links."""
        if not seconds:
            return self.now
        self.link = max(self.link, self.now) + seconds
        self.exchanging += seconds + self.lateness
        return self.link + self.lateness

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of an action: `compute` + `exposed`; `again` is a part of `compute`."""

    seconds: float
    compute: float
    again: float
    exposed: float

    def times(self, factor: float) -> "Cost":
        return Cost(**{name: factor * value for name, value in vars(self).items()})


class RankCosts:
    """Of one rank's actions, in order. `hidden`: the share of a pair's exchanges that compute can cover. `peer_wait`: how late the last
    peer is in an exchange, of the blocks' compute between two."""

    def __init__(
        self,
        stages: Sequence[StageSteps],
        *,
        hidden: float = 1.0,
        peer_wait: float = 0.0,
        pairs: dict[tuple, Cost] | None = None,
    ):
        self.stages, self.hidden, self.peer_wait = stages, hidden, peer_wait
        self.deferred: dict[tuple[int, int], Waiting] = {}
        self.pairs = {} if pairs is None else pairs  # by their ops' kinds and stages: alike for every micro-batch
        self.lone: dict[tuple[str, int], Cost] = {}  # likewise, where nothing waits that could run beside

    def of(self, actions: Sequence[Action]) -> list[Cost]:
        return [self._pair(action) if len(action) > 1 else self._alone(action[0]) for action in actions]

    def _pair(self, action: Action) -> Cost:
        forward, backward = action
        key = tuple((op.kind, op.stage) for op in action)
        if key not in self.pairs or backward.kind == "I":  # an I leaves weight gradients of its own
            beside = self._exchanges(forward.stage) + self._exchanges(backward.stage) > 0
            clock = Clock(lateness=self._lateness(action, beside))
            running = [self._backward(clock, backward, beside), self._forward(clock, forward, beside)]
            done = object()
            while running:
                running = [step for step in running if next(step, done) is not done]
            # Of what compute could cover, software leaves some bare.
            seconds = max(clock.now, clock.compute + (1 - self.hidden) * clock.exchanging)
            self.pairs[key] = Cost(seconds=seconds, compute=clock.compute, again=clock.again, exposed=seconds - clock.compute)
        return self.pairs[key]

    def _alone(self, op: Op) -> Cost:
        if op.kind in "FB" and not any(self.deferred.values()):
            key = op.kind, op.stage
            if key not in self.lone:
                self.lone[key] = self._run(op)
            return self.lone[key]
        return self._run(op)

    def _run(self, op: Op) -> Cost:
        clock = Clock(lateness=self._lateness((op,), False))
        if op.kind == "W":
            for seconds, _, again in self.deferred.pop((op.stage, op.micro_batch)):
                clock.run(seconds, again)
        else:
            for _ in (self._forward if op.kind == "F" else self._backward)(clock, op, False):
                pass
        return Cost(seconds=clock.now, compute=clock.compute, again=clock.again, exposed=clock.now - clock.compute)

    def _exchanges(self, stage: int) -> int:
        """In a forward, or in a backward."""
        return sum(isinstance(step, Exchange) and bool(step.alone) for step in self.stages[stage])

    def _lateness(self, action: Action, beside: bool) -> float:
        passes = {"F": "F", "I": "B", "B": "BW", "W": "W"}
        num = sum(self._exchanges(op.stage) for op in action)
        compute = sum(
            step.of(when, beside).seconds
            for op in action
            for step in self.stages[op.stage]
            if isinstance(step, Compute) and step.name in ("attention", "experts", "mlp")
            for when in passes[op.kind]
        )
        return self.peer_wait * compute / num if num and self.peer_wait else 0.0

    def _forward(self, clock: Clock, op: Op, beside: bool) -> Iterator[None]:
        for step in self.stages[op.stage]:
            if isinstance(step, Compute):
                busy = step.of("F", beside)
                clock.run(busy.seconds, busy.again)
            else:
                yield from self._under_way(clock, step, "F", beside, [])

    def _backward(self, clock: Clock, op: Op, beside: bool) -> Iterator[None]:
        later = op.kind == "I"
        waiting: Waiting = self.deferred.setdefault((op.stage, op.micro_batch), []) if later else []
        for step in reversed(self.stages[op.stage]):
            if isinstance(step, Compute):
                busy, weights = step.of("B", beside), step.of("W", beside)
                clock.run(busy.seconds, busy.again)
                if weights.seconds:
                    waiting.append((step.of("W", False).seconds, weights.seconds, weights.again))
            else:
                yield from self._under_way(clock, step, "B", beside, [] if later else waiting)
        if not later:
            self._weights(clock, waiting, beside)

    def _under_way(self, clock: Clock, step: Exchange, when: str, beside: bool, own: Waiting) -> Iterator[None]:
        arrival = clock.issue(step.of(when, beside))
        if own:
            self._weights(clock, own, beside)
        elif not beside and step.alone:
            self._fill(clock)
        yield
        clock.wait(arrival)

    def _fill(self, clock: Clock) -> None:
        """The oldest that wait for their action."""
        for waiting in self.deferred.values():
            if waiting:
                _, seconds, again = waiting.pop(0)
                return clock.run(seconds, again)

    def _weights(self, clock: Clock, waiting: Waiting, beside: bool) -> None:
        for alone, under, again in waiting:
            clock.run(under if beside else alone, again)
        waiting.clear()
