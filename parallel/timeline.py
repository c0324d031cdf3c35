"""When each action of a schedule's lists runs, if every action takes a given time: makespan, bubble, activations, without running one.

It is what the executor does on a clock of its own: a rank starts its next action when the one before is over and what all the action's
ops need has arrived; an action's results are sent when it ends. Times are in whatever unit the durations have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .schedule.ops import Action, Held, Lists, Op, inputs, result, running_order


class Span(NamedTuple):
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`spans[rank]`: its actions in order."""

    spans: list[list[Span]]

    @cached_property
    def makespan(self) -> float:
        return max((s.end for spans in self.spans for s in spans), default=0.0)

    @property
    def idle(self) -> list[float]:
        """Of each rank, from the step's start to the end of its last rank."""
        return [self.makespan - sum(s.end - s.start for s in spans) for spans in self.spans]

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        return sum(self.idle) / (len(self.spans) * self.makespan) if self.makespan else 0.0

    @property
    def held(self) -> list[Held]:
        """The most activations and weight-gradient closures at a time, of each rank."""
        return [Held.by([s.action for s in spans]) for spans in self.spans]


Order = list[tuple[int, Action, list[tuple[int, int]]]]  # rank, its next action, and (rank, index) of the actions that made its inputs


def order(lists: Lists) -> Order:
    """In which lists can run, whatever their actions take. Raises ValueError if they cannot finish."""
    num_stages = 1 + max((op.stage for actions in lists for action in actions for op in action), default=-1)
    made: dict[Op, tuple[int, int]] = {}
    found: Order = []
    for rank, index in running_order(lists, num_stages):
        action = lists[rank][index]
        found.append((rank, action, [made[need] for op in action for need in inputs(op, num_stages)]))
        made.update((result(op), (rank, index)) for op in action)
    return found


def simulate(
    lists: Lists,
    duration: Callable[[Action], float],
    latency: Callable[[int, int], float] = lambda sender, receiver: 0,
    known: Order | None = None,
) -> Timeline:
    """`duration(action)`: of one op or of a pair. `latency(sender, receiver)`: from the end of an action to the arrival of what it made
    on another rank. `known`: these lists' `order`. Raises ValueError if the lists cannot finish."""
    spans: list[list[Span]] = [[] for _ in lists]
    for rank, action, needs in order(lists) if known is None else known:
        start = spans[rank][-1].end if spans[rank] else 0
        for sender, index in needs:
            start = max(start, spans[sender][index].end + (latency(sender, rank) if sender != rank else 0))
        spans[rank].append(Span(action=action, start=start, end=start + duration(action)))
    return Timeline(spans)


def by_kind(*, pair: float | None = None, **seconds: float) -> Callable[[Action], float]:
    """Durations that depend on the kinds of an action's ops alone: `by_kind(F=1, B=2, I=1, W=1, pair=3)`; a pair takes its ops' sum
    unless told otherwise."""
    return lambda action: pair if pair is not None and len(action) > 1 else sum(seconds[op.kind] for op in action)
