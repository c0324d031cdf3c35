"""Which ranks of a job differ in what they hold and do: one of each kind stands for all of it.

Every place in the pipeline is another kind. Among its ranks, those differ whose peers lie otherwise to the nodes: a rank of a node's own
expert-parallel group sends nothing between nodes, say.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from ...conf.schema import Config
from ...parallel.groups import partitions


def kinds(config: Config) -> list[list[int]]:
    """The ranks of each kind, in order. Counts of rows that whole numbers leave uneven are taken as even, and so is what Muon gives each
    owner."""
    p, gpus = config.parallel, config.cluster.gpus_per_node
    parts = partitions(p, embeds_at_head=config.model.embeds_at_head, gpus_per_node=gpus)
    groups = {name: {rank: ranks for ranks in of_name for rank in ranks} for name, of_name in parts.items()}
    found: dict[tuple, list[int]] = {}
    for rank in range(p.world_size):
        around = tuple(_around(name, rank, of_rank[rank], gpus) for name, of_rank in groups.items() if rank in of_rank)
        found.setdefault((rank // p.dp, around), []).append(rank)
    return list(found.values())


def _around(name: str, rank: int, peers: Sequence[int], gpus_per_node: int) -> tuple:
    """How the peers of a group lie: in a pipeline each of them, elsewhere how many; in a ring all are alike."""
    nodes = [peer // gpus_per_node for peer in peers]
    if name.startswith("pp "):
        return tuple(node == rank // gpus_per_node for node in nodes)
    if name.startswith("ep "):
        return name, nodes.count(rank // gpus_per_node), len(nodes)
    return name, tuple(sorted(Counter(nodes).values()))


def spans(ranks: Iterable[int]) -> str:
    """Numbers in a few words: "0-3, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(words) if len(words) <= 4 else f"{', '.join(words[:3])}, ... {words[-1]}"
