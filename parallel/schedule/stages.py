"""Which blocks each pipeline stage has: as the user wrote it, or shared out by cost."""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

from ...conf.errors import ConfigError


def parse_stages(text: str, num_layers: int, num_stages: int) -> list[range]:
    """ "5|4*6|3": blocks of each stage in stage order, "n*k" for k stages of n. Embedding, head and modules of multi-token prediction are
    not counted: the first and the last stage, which have them, may be without a block.

    Raises ConfigError (parallel.stages) with the nearest split that this model and pipeline can have.
    """
    words = [word.strip().split("*") for word in text.split("|")]
    if not all(len(w) <= 2 and all(part.strip().isdecimal() for part in w) for w in words):
        raise ConfigError("parallel.stages", text, 'want blocks of each stage, such as "5|4*6|3"', _text(_near([], num_layers, num_stages)))
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
        raise ConfigError("parallel.stages", text, rule, _text(_near(counts, num_layers, num_stages)))
    return [range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]


def _near(counts: list[int], num_layers: int, num_stages: int) -> list[int]:
    """As many stages and blocks as there are; few and many blocks stay so."""
    counts = [min(max(1, n), num_layers) for n in [*counts, *[1] * num_stages][:num_stages]]
    while (rest := num_layers - sum(counts)) != 0:
        at = counts.index(min(counts) if rest > 0 else max(counts))
        counts[at] += 1 if rest > 0 else -1
    return counts


def _text(counts: list[int]) -> str:
    runs = [(n, len(list(same))) for n, same in groupby(counts)]
    return "|".join(f"{n}*{times}" if times > 1 else str(n) for n, times in runs)


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
