"""Which blocks each pipeline stage has: as the user wrote it, or shared out by cost."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise

from ...conf.errors import ConfigError

CostOf = Callable[[int, int, int], float]  # stage, its first layer, the one after its last


def parse_stages(text: str, num_layers: int, num_stages: int) -> list[range]:
    """ "5|4*6|3": blocks of each stage in stage order, "n*k" for k stages of n. Embedding, head and modules of multi-token prediction are
    not counted: the first and the last stage, which have them, may be without a block.

    Raises ConfigError (parallel.stages) with the nearest split that this model and pipeline can have.
    """
    words = [word.strip().split("*") for word in text.split("|")]
    if not all(len(w) <= 2 and all(part.strip().isdecimal() for part in w) for w in words):
        raise ConfigError(
            "parallel.stages", text, 'want blocks of each stage, such as "5|4*6|3"', stages_text(_near([], num_layers, num_stages))
        )
    counts = [int(n) for n, *times in words for _ in range(int(*times) if times else 1)]
    empty = [s for s, n in enumerate(counts) if n == 0 and (0 < s < num_stages - 1 or num_stages == 1)]
    rule = ""
    if len(counts) != num_stages:
        rule = f"names {len(counts)} stages, and parallel.pp x parallel.chunks are {num_stages}"
    elif empty:
        rule = f"stage {empty[0]} has no block: only a first stage (embedding) and a last one (head) can do without"
    elif sum(counts) != num_layers:
        rule = f"shares out {sum(counts)} blocks, and model.num_layers is {num_layers}"
    if rule:
        raise ConfigError("parallel.stages", text, rule, stages_text(_near(counts, num_layers, num_stages)))
    return [range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]


def _near(counts: list[int], num_layers: int, num_stages: int) -> list[int]:
    """As many stages and blocks as there are; few and many blocks stay so."""
    counts = [min(max(1, n), num_layers) for n in [*counts, *[1] * num_stages][:num_stages]]
    while (rest := num_layers - sum(counts)) != 0:
        at = counts.index(min(counts) if rest > 0 else max(counts))
        counts[at] += 1 if rest > 0 else -1
    return counts


def stages_text(counts: list[int]) -> str:
    """As `parallel.stages` has it."""
    runs = [(n, len(list(same))) for n, same in groupby(counts)]
    return "|".join(f"{n}*{times}" if times > 1 else str(n) for n, times in runs)


def split_layers(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0, mirrored: bool = False) -> list[range]:
    """Contiguous shares of the layers, at least one each, whose dearest stage is cheapest; with `mirrored`, where a rank holds stages s and
    num_stages - 1 - s, those of them whose dearest rank is cheapest. (The other way round, ranks first, stages grow so uneven that the
    step takes longer.)

    `costs`: of each layer, in any unit; `first` and `last`: what the ends cost beside their layers.
    """
    n = len(costs)
    assert 1 <= num_stages <= n and min(costs) >= 0 and not (mirrored and num_stages % 2)
    sums = list(accumulate(costs, initial=0.0))

    def cost_of(stage: int, a: int, b: int) -> float:
        return sums[b] - sums[a] + (first if stage == 0 else 0.0) + (last if stage == num_stages - 1 else 0.0)

    cuts = _cuts(n, num_stages, cost_of)
    if mirrored:
        dearest = max(cost_of(s, a, b) for s, (a, b) in enumerate(pairwise(cuts)))
        cuts = _mirrored_cuts(n, num_stages, cost_of, dearest)
    return [range(a, b) for a, b in pairwise(cuts)]


def _cuts(n: int, num_stages: int, cost_of: CostOf) -> list[int]:
    # best[b]: (dearest stage, cut points) of the first b layers over the stages so far; ties keep earlier stages shorter
    best = {b: (cost_of(0, 0, b), [0, b]) for b in range(1, n - num_stages + 2)}
    for stage in range(1, num_stages):
        longer = {}
        for b in range(stage + 1, n - (num_stages - 1 - stage) + 1):
            least, at = math.inf, 0
            for a in range(b - 1, stage - 1, -1):  # the stage grows
                if (own := cost_of(stage, a, b)) > least:
                    break
                if (dearest := max(best[a][0], own)) <= least:
                    least, at = dearest, a
            longer[b] = least, [*best[at][1], b]
        best = longer
    return best[n][1]


def _mirrored_cuts(n: int, num_stages: int, cost_of: CostOf, limit: float) -> list[int]:
    """Of the splits in which no stage costs more than `limit`, that whose dearest rank is cheapest."""
    # best[a, b]: (dearest rank, front cuts, back cuts) with layers 0 to a and b to n shared out, from both ends inwards
    best: dict[tuple[int, int], tuple[float, list[int], list[int]]] = {(0, n): (0.0, [0], [n])}
    for stage in range(num_stages // 2):
        inner, grown = num_stages - 2 * (stage + 1), {}  # stages still to come between the two
        for (a0, b0), (worst, fronts, backs) in best.items():
            for a in range(a0 + 1, b0 - inner):
                if (front := cost_of(stage, a0, a)) > limit:
                    break
                for b in range(b0 - 1, a + inner - 1, -1) if inner else (a,):  # the two in the middle meet
                    if (back := cost_of(num_stages - 1 - stage, b, b0)) > limit:
                        break
                    dearest = max(worst, front + back)
                    if dearest < grown.get((a, b), (math.inf,))[0]:
                        grown[a, b] = dearest, [*fronts, a], [b, *backs]
        best = grown
    _, fronts, backs = min(best.values(), key=lambda found: found[0])
    return fronts + backs[1:]
