"""What a list of actions is made of, and what can be read off one without running it.

An action is one op, or a forward and a backward that the executor overlaps. Ops: F forward, B full backward, I input gradients only,
W the weight gradients that an I left.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Op(NamedTuple):
    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Action = tuple[Op, ...]
Lists = Sequence[Sequence[Action]]  # each rank's actions
Placements = tuple[tuple[int, ...], ...]  # pipeline rank of each stage, for each direction


class Held(NamedTuple):
    """The most that a rank holds at a time, counted in (stage, micro-batch)."""

    activations: int  # forward has run or runs, neither B nor I is over
    closures: int  # I is over, W is not

    @classmethod
    def by(cls, actions: Sequence[Action]) -> "Held":
        activations = closures = most_activations = most_closures = 0
        for action in actions:
            kinds = [op.kind for op in action]
            activations += kinds.count("F")
            most_activations = max(most_activations, activations)  # what a backward frees is still there beside its forward
            activations -= kinds.count("B") + kinds.count("I")
            closures += kinds.count("I") - kinds.count("W")
            most_closures = max(most_closures, closures)
        return cls(most_activations, most_closures)


def direction_of(micro_batch: int, num: int, directions: int) -> int:
    """Which of a schedule's placements micro-batch `micro_batch` of `num` runs through: equal shares, in order."""
    return micro_batch * directions // num


def text(action: Action) -> str:
    return "+".join(map(str, action))


def result(op: Op) -> Op:
    """The name of what an op makes for others: B and I both make the gradient of the stage's input."""
    return op._replace(kind="B") if op.kind == "I" else op


def inputs(op: Op, num_stages: int) -> list[Op]:
    """The results an op needs, its own stage's first."""
    kind, s, i = op
    if kind == "F":
        return [Op("F", s - 1, i)] if s else []
    if kind == "W":
        return [Op("B", s, i)]
    return [Op("F", s, i)] + ([Op("B", s + 1, i)] if s < num_stages - 1 else [])


def running_order(lists: Lists, num_stages: int) -> Iterator[tuple[int, int]]:
    """(rank, index) of every action in an order in which the lists can run, each rank's own order kept.

    An action starts when what *all* its ops need has been made by actions that are over. Raises ValueError where no rank can go on.
    """
    done: set[Op] = set()
    missing = lambda action: [need for op in action for need in inputs(op, num_stages) if need not in done]
    at, moved = [0] * len(lists), True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions) and not missing(actions[at[rank]]):
                yield rank, at[rank]
                done.update(map(result, actions[at[rank]]))
                at[rank] += 1
                moved = True
    stuck = [(rank, n, lists[rank][n]) for rank, n in enumerate(at) if n < len(lists[rank])]
    if stuck:
        waits = (f"rank {rank}, action {n} ({text(a)}) waits for {', '.join(map(str, missing(a)))}" for rank, n, a in stuck)
        raise ValueError("the lists cannot finish: " + "; ".join(waits))
