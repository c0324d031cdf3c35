"""Proves of a schedule's lists that they compute every gradient once, and end.

What the executor does with a list, and why these rules suffice. Per rank it runs the actions in order; sends are asynchronous, and a send
is over when the other side has posted its receive, which happens one action before the one that needs it. Every link (F or B, between
two neighbouring stages) is a communicator of its own, used one way, so a send never waits for a send of another link. Hence:

- on one link, the n-th send meets the n-th receive: both ends must have the same order of micro-batches, or tensors are swapped;
- nobody waits but for a receive, so the step ends if and only if the actions can be put in an order in which each comes after those that
  make what it needs. An action of two ops starts when the inputs of both are there and gives nothing before it starts: backward runs to
  its first exchange, then waits for the forward's input;
- the ranks of an expert-parallel group have the same pipeline rank, hence the same list, and issue their exchanges in the same order
  whatever that order is. Forward and backward exchanges go through two groups so that they can fly at once, not for order's sake;
- a loss is computed where the last stage of the micro-batch's direction is: `placements[direction][-1]`.
"""

from collections.abc import Sequence
from itertools import pairwise

from .ops import Held, Lists, Op, Placements, direction_of, result, running_order, text

Where = dict[Op, tuple[int, int]]  # rank, index of the action


def validate(lists: Lists, placements: Placements, num: int, bound: Sequence[Held] | None = None) -> list[Held]:
    """The most activations and weight-gradient closures that each rank holds, of lists that are right: each stage runs every micro-batch
    forward and backward once, on its rank, in an order that can finish, and no rank holds more than its `bound`.

    Raises ValueError, which names rank, action and op, of lists that are not.
    """
    where = _places(lists, placements, num)
    _complete(where, placements, num)
    _one_order_per_link(where, placements, num)
    for _ in running_order(lists, len(placements[0])):
        pass
    held = [Held.by(actions) for actions in lists]
    for rank, (most, allowed) in enumerate(zip(held, bound or held, strict=True)):
        for what, n, limit in zip(Held._fields, most, allowed, strict=True):
            if n > limit:
                raise ValueError(f"rank {rank} holds {n} {what} at a time, and its schedule promises {limit}")
    return held


def _places(lists: Lists, placements: Placements, num: int) -> Where:
    """Where each op stands; every one is on its rank, and stands once."""
    where: Where = {}
    num_stages, num_ranks = len(placements[0]), 1 + max(map(max, placements))
    if len(lists) != num_ranks:
        raise ValueError(f"there are {len(lists)} lists for {num_ranks} pipeline ranks")
    for rank, actions in enumerate(lists):
        for index, action in enumerate(actions):
            at = f"rank {rank}, action {index} ({text(action)})"
            if "".join(op.kind for op in action) not in ("F", "B", "I", "W", "FB", "FI"):
                raise ValueError(f"{at}: an action is one of F, B, I and W, or a forward and then the backward beside it")
            for op in action:
                if not (0 <= op.stage < num_stages and 0 <= op.micro_batch < num):
                    raise ValueError(f"{at}: there are stages 0 to {num_stages - 1} and micro-batches 0 to {num - 1}, not {op}")
                holder = placements[direction_of(op.micro_batch, num, len(placements))][op.stage]
                if holder != rank:
                    raise ValueError(f"{at}: {op} is for rank {holder}, which holds the stage")
                if op in where:
                    raise ValueError(f"{at}: {op} runs already in action {where[op][1]}")
                where[op] = (rank, index)
    return where


def _complete(where: Where, placements: Placements, num: int) -> None:
    """Every stage runs every micro-batch: F and then B, or F, then I, then W."""
    for i in range(num):
        for stage, rank in enumerate(placements[direction_of(i, num, len(placements))]):
            kinds = "".join(kind for kind in "FBIW" if Op(kind, stage, i) in where)
            if kinds not in ("FB", "FIW"):
                raise ValueError(f"rank {rank} has {kinds or 'nothing'} for stage {stage}, micro-batch {i}: want F and B, or F, I and W")
            for before, after in pairwise(kinds):
                first, second = where[Op(before, stage, i)][1], where[Op(after, stage, i)][1]
                if first >= second:
                    raise ValueError(f"rank {rank}, action {second}: {Op(after, stage, i)} needs {Op(before, stage, i)}, of action {first}")


def _one_order_per_link(where: Where, placements: Placements, num: int) -> None:
    """What one stage sends is what the next expects, in the same order."""
    orders: dict[tuple[str, int, int], list[Op]] = {}
    for op in sorted(where, key=where.__getitem__):
        if op.kind != "W":
            orders.setdefault((result(op).kind, op.stage, direction_of(op.micro_batch, num, len(placements))), []).append(op)
    for (kind, stage, direction), sent in orders.items():
        other, ranks = stage + (1 if kind == "F" else -1), placements[direction]
        if not 0 <= other < len(ranks) or ranks[other] == ranks[stage]:
            continue
        for n, (a, b) in enumerate(zip(sent, orders[kind, other, direction], strict=True)):
            if a.micro_batch != b.micro_batch:
                raise ValueError(
                    f"rank {ranks[stage]}, action {where[a][1]} sends {a} to rank {ranks[other]} as number {n} of that link, where action "
                    f"{where[b][1]} receives for {b}: a link carries micro-batches in one order"
                )
