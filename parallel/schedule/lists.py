"""The schedules' lists of actions, one function each: (pp, chunks, M) -> each rank's list for M micro-batches.

`F+B` is a pair that runs overlapped. Where torch has the list it is torch's: `validate` checks it as it does ours. (torch's 1F1B list is
not right on the last rank, hence our own; torch has no DualPipe.)
"""

from collections import deque

from .._torch import get_schedule_ops
from .ops import Action, Op


def one_f_one_b(pp: int, chunks: int, num: int) -> list[list[Action]]:
    """Rank r runs pp - r forwards ahead, then one backward per forward: backward i follows forward i + (pp - 1 - r)."""
    lists = []
    for rank in range(pp):
        ops = [Op(kind, rank, i) for kind in "FB" for i in range(num)]
        ops.sort(key=lambda op: (op.micro_batch + (pp - 1 - op.stage) * (op.kind == "B"), op.kind == "B"))
        lists.append([(op,) for op in ops])
    return lists


def interleaved_1f1b(pp: int, chunks: int, num: int) -> list[list[Action]]:
    return _torchs("Interleaved1F1B", pp, chunks, num)


def zbv(pp: int, chunks: int, num: int) -> list[list[Action]]:
    return _torchs("ZBVZeroBubble", pp, chunks, num)


def dualpipev(pp: int, chunks: int, num: int) -> list[list[Action]]:
    return _torchs("DualPipeV", pp, chunks, num)


def _torchs(name: str, pp: int, chunks: int, num: int) -> list[list[Action]]:
    ours = lambda a: Op(a.computation_type.value, a.stage_index, a.microbatch_index)
    lists = get_schedule_ops(name, pp, num, num_stages_per_rank=chunks)
    return [[tuple(map(ours, a.sub_actions or (a,))) for a in actions if a is not None] for actions in lists]


def dualpipe(pp: int, chunks: int, num: int) -> list[list[Action]]:
    """DeepSeek-V3's own (technical report, section 3.2.1): micro-batches enter at both ends at once, half of them at each."""
    return [_DualPipeRank(pp, rank, num).actions() for rank in range(pp)]


class _DualPipeRank:
    """One rank's list, step by step as DeepSeek's repository numbers them. Directions are 0, which enters at the rank's near end, and 1."""

    def __init__(self, pp: int, rank: int, num: int):
        self.half, self.near, self.each = pp // 2, min(rank, pp - 1 - rank), num // 2
        entry = int(rank >= self.half)  # the schedule's direction that the near one is
        self.stages = [self.near, pp - 1 - self.near]
        self.firsts = [entry * self.each, (1 - entry) * self.each]  # micro-batch
        self.counts = {kind: [0, 0] for kind in "FB"}
        self.waiting: deque[Op] = deque()  # weight gradients

    def op(self, kind: str, direction: int) -> Op:
        count = self.counts["F" if kind == "F" else "B"]
        op = Op(kind, self.stages[direction], self.firsts[direction] + count[direction])
        count[direction] += 1
        if kind == "I":
            self.waiting.append(op._replace(kind="W"))
        return op

    def actions(self) -> list[Action]:
        one = lambda kind, direction: (self.op(kind, direction),)
        pair = lambda forward, backward: (self.op("F", forward), self.op("B", backward))
        weights = lambda: (self.waiting.popleft(),)
        ahead = self.half - 1 - self.near
        made = [one("F", 0) for _ in range(2 * ahead)]  # step 1
        for _ in range(self.near + 1):  # step 2
            made += one("F", 0), one("F", 1)
        for _ in range(ahead):  # step 3
            made += one("I", 1), weights(), one("F", 1)
        for n in range(self.each - ahead - self.half):  # step 4, the steady state
            apart = n == 0 and ahead == 0  # the middle ranks': whoever waits for either need not wait for both
            made += [one("F", 0), one("B", 1)] if apart else [pair(0, 1)]
            made.append(pair(1, 0))
        for _ in range(ahead):  # step 5
            made += one("B", 1), pair(1, 0)
        for n in range(2 * self.near + 2):  # step 6
            made.append(one("B" if n <= self.near else "I", 1 - n % 2))
        for _ in range(ahead):  # step 7
            made += weights(), one("I", 0)
        return made + [weights() for _ in range(self.near + 1)]  # step 8
