"""What only ranks together can find out: versions and clocks that differ, a run directory that not all nodes see, links that are slow.

What measures is called by all ranks of a world that has been joined; what judges is pure. Bytes are those that leave a rank.

    pairs of 4 ranks, in 3 rounds, all pairs of a round at once:   0-3 1-2 | 3-2 0-1 | 2-1 3-0 ...  each pair once
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...conf.schema import ClusterConfig, Config
from ..bench import links
from . import software
from .line import FAIL, WARN, Line, fail, nearest_there, ok, skipped, some, version_mismatch, warn

KIND = "fabric"
CLOCK_ROUNDS = 8
CLOCK_S = {WARN: 0.5, FAIL: 5.0}  # off by more
_EVERY_PAIR = 64  # ranks up to which every pair is tried; above, those of a node, and those of equal place on two nodes
_FEW = 3  # links of a kind, below which none is compared with the others
_SLOW = 0.5  # of the median link's rate
_MOST_AGAIN, _TIMES_AGAIN = 16, 3  # slow links that are tried again, alone; the best counts: others may have been busy
_REACHED = {WARN: 0.7, FAIL: 0.4}  # of the rate that the cluster's file leads to expect
_LINKS = {"intra": "inside nodes", "inter": "between nodes"}
_LOOK_AT = {
    "intra": "nvidia-smi topo -m; nvidia-smi nvlink -s",
    "inter": "ibstat and ib_write_bw on these hosts; their cables and switch ports",
}

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank. `node`: the first rank of its machine. `host`: that machine's name here."""

    rank: int
    node: int
    host: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def look_together(config: Config, device: torch.device, node: int, host: str, *, clock: Callable[[], float] = time.time) -> list[Line]:
    """All that ranks find out together; on rank 0, of the others nothing."""
    members = everyones(Member(rank=dist.get_rank(), node=node, host=host, versions=_versions(device)))
    lines = [*versions(members), clocks(members, clock), *shared_folder(config, members)]
    if len(members) > 1:
        lines += bandwidths(config.cluster, device, members)
        lines += pairs(config.cluster, device, members)
    return lines if dist.get_rank() == 0 else []


def everyones(mine):
    """Of each rank, in order."""
    all_of_them = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    return all_of_them


def _versions(device: torch.device) -> dict[str, str]:
    found = software.versions()
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def versions(members: Sequence[Member]) -> list[Line]:
    """A failure for each that is not the same on all ranks."""
    names = list(dict.fromkeys(name for member in members for name in member.versions))
    differ = []
    for name in names:
        differ += version_mismatch("software", name, {str(m): m.versions.get(name, "not installed") for m in members})
    said = ", ".join(f"{name} {members[0].versions[name]}" for name in names if name in members[0].versions)
    return differ or [ok("software", "alike on all ranks", said)]


# ---------------------------------------------------------------- clocks


def clocks(members: Sequence[Member], clock: Callable[[], float] = time.time) -> Line:
    """Everybody's wall clock against most others'. Two exchanges in a row, between which each rank reads its clock: every rank's reading
    lies between the moment that this one enters the first and the moment that it leaves the second (Cristian's algorithm, for all at once).
    The narrowest of what several rounds say remains.
    """
    low, high = torch.full((len(members),), -torch.inf, dtype=torch.float64), torch.full((len(members),), torch.inf, dtype=torch.float64)
    for _ in range(CLOCK_ROUNDS):
        entered = clock()
        _stamps(entered)
        theirs = _stamps(clock())
        left = clock()
        low, high = torch.maximum(low, theirs - left), torch.minimum(high, theirs - entered)
    return _clock_line(members, ((low + high) / 2).tolist(), ((high - low).abs() / 2).tolist())


def _stamps(moment: float) -> torch.Tensor:
    """Over gloo."""
    stamps = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(stamps, torch.tensor([moment], dtype=torch.float64))
    return torch.cat(stamps)


def _clock_line(members: Sequence[Member], offsets: Sequence[float], bounds: Sequence[float]) -> Line:
    """Offsets from rank 0, in seconds, each with its bound. With two ranks nobody knows who is right: rank 0 is taken to be."""
    centre = statistics.median_low(offsets) if len(members) > 2 else 0.0
    off = [offset - centre for offset in offsets]
    surely = [abs(offset) - bound for offset, bound in zip(off, bounds)]
    worst = max(range(len(off)), key=lambda rank: abs(off[rank]))
    do = "timedatectl; chronyc tracking; sudo chronyc makestep, on these hosts"
    for state in (FAIL, WARN):
        wrong = [rank for rank in range(len(off)) if surely[rank] > CLOCK_S[state]]
        if wrong:
            said = some(f"{members[rank]} {off[rank]:+.3f} s (± {bounds[rank]:.3f})" for rank in wrong)
            return Line(kind=KIND, check="clocks", state=state, value=f"not as the others': {said}", advice=do)
    if (bound := max(bounds)) > CLOCK_S[WARN]:
        return warn(KIND, "clocks", f"could be told to ± {bound:.3f} s only: the ranks answer too slowly", "what keeps them busy? uptime")
    return ok(KIND, "clocks", f"within {abs(off[worst]):.4f} s (± {bounds[worst]:.4f}) of each other")


# ---------------------------------------------------------------- storage


def shared_folder(config: Config, members: Sequence[Member]) -> list[Line]:
    """Do all nodes see what rank 0 writes beside the checkpoints?"""
    nodes = {m.node: m.host for m in members}
    if len(nodes) == 1:
        return []
    marker, said = [""], []
    if dist.get_rank() == 0:
        marker = [os.path.join(nearest_there(config.run_dir), f".shoestring-doctor-shared-{os.getpid()}")]
        try:
            os.close(os.open(marker[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError:
            marker = [""]
    dist.broadcast_object_list(marker, src=0)
    seen = everyones(bool(marker[0]) and os.path.exists(marker[0]))
    if dist.get_rank() == 0 and marker[0]:
        os.unlink(marker[0])
    blind = list(dict.fromkeys(m.host for m, sees in zip(members, seen) if not sees))
    if not marker[0]:
        said = [skipped("storage", "run_dir is shared", "rank 0 cannot write there")]
    elif blind:
        value = f"{some(blind)} does not see what {members[0].host} writes in {os.path.dirname(marker[0])}"
        said = [fail("storage", "run_dir is shared", value, "run_dir=/a/folder/that/all/nodes/mount")]
    return said or [ok("storage", "run_dir is shared", f"{len(nodes)} nodes see the same folder")]


# ---------------------------------------------------------------- bandwidth of all together


def bandwidths(cluster: ClusterConfig, device: torch.device, members: Sequence[Member]) -> list[Line]:
    """All-to-all inside nodes and between them, all-reduce of all, against what the cluster's file leads to expect."""
    size = 1 << (24 if device.type == "cuda" else 20)
    found = links.measure(device, [f"{m.node}" for m in members], [size])
    rates, lines = cluster.rates, []
    expected = {"intra": cluster.intra_node_gb_s * rates.intra_node, "inter": cluster.inter_node_gb_s * rates.inter_node}
    for kind, where in _LINKS.items():
        times = found[kind].among_all
        if times:
            lines.append(_rate_line(cluster, f"all-to-all {where}", times[-1][0] / times[-1][1] / 1e9, expected[kind], f"{kind}_node"))
    nodes = len({m.node for m in members})
    limits = {"intra": expected["intra"]} | ({"inter": expected["inter"] * len(members) / nodes} if nodes > 1 else {})  # rings use all NICs
    slowest = min(limits, key=lambda kind: limits[kind])
    total = torch.zeros(4 * size, dtype=torch.uint8, device=device).view(torch.float32)
    seconds = links.median(lambda: dist.all_reduce(total), device, dist.group.WORLD)
    reached = 2 * (len(members) - 1) / len(members) * total.nbytes / seconds / 1e9
    lines.append(_rate_line(cluster, "all-reduce", reached, limits[slowest], f"{slowest}_node"))
    return lines


def _rate_line(cluster: ClusterConfig, check: str, reached: float, expected: float, field: str) -> Line:
    """In GB/s. Cores of a CPU are shared: what they reach is no failure."""
    value = f"{reached:.3g} GB/s from each rank, {expected:.3g} expected (cluster.{field}_gb_s x its share in cluster.rates)"
    if reached >= _REACHED[WARN] * expected:
        return ok(KIND, check, value)
    if cluster.device.startswith("CPU"):
        return warn(KIND, check, value, "shoestring bench fabric name=mine measures this machine: cluster=mine")
    do = f"NCCL_DEBUG=INFO shows which network NCCL takes; {_LOOK_AT[field.removesuffix('_node')]}"
    return Line(kind=KIND, check=check, state=FAIL if reached < _REACHED[FAIL] * expected else WARN, value=value, advice=do)


# ---------------------------------------------------------------- bandwidth of each link


def pairs(cluster: ClusterConfig, device: torch.device, members: Sequence[Member]) -> list[Line]:
    """Messages there and back over every link, all links of a round at once; those that are slow again, alone, as the median link is,
    and named if they still are."""
    size = 1 << (24 if device.type == "cuda" else 20)
    nodes: dict[int, list[int]] = {}
    for m in members:
        nodes.setdefault(m.node, []).append(m.rank)
    every = (pair for together in rounds(list(nodes.values())) for pair in together)
    seconds = _gathered({pair: took for pair in every if (took := links.echo(pair, size, device))})
    suspects = [*slow_links(seconds, members)][:_MOST_AGAIN]
    suspects += dict.fromkeys(usual(seconds, members, _kind(pair, members)) for pair in suspects)
    again: dict[Pair, float] = {}
    for pair in suspects * _TIMES_AGAIN:
        dist.barrier()
        if took := links.echo(pair, size, device):
            again[pair] = min(took, again.get(pair, took))
    again = _gathered(again)
    return list(_pair_lines(cluster, seconds, again, members, size)) if dist.get_rank() == 0 else []


def rounds(nodes: Sequence[Sequence[int]]) -> Iterator[list[Pair]]:
    """Pairs of ranks that can be tried at once, until every link has been: every pair of ranks, or in a large world every pair of a node,
    then every two nodes, ranks of equal place with each other. `nodes`: the ranks of each. Pure: the same on every rank."""
    ranks = [rank for node in nodes for rank in node]
    if len(ranks) <= _EVERY_PAIR:
        yield from tournament(ranks)
        return
    insides = [list(tournament(node)) for node in nodes]
    for at in range(max(map(len, insides))):
        yield [pair for inside in insides if at < len(inside) for pair in inside[at]]
    for meeting in tournament(list(range(len(nodes)))):
        yield [pair for a, b in meeting for pair in zip(nodes[a], nodes[b])]


def tournament(ranks: Sequence[int]) -> Iterator[list[Pair]]:
    """Everybody with everybody in as few rounds as can be: one seat stays, the others go round it. In an odd number one waits."""
    seats = [*ranks, *([None] * (len(ranks) % 2))]
    for _ in range(len(seats) - 1):
        faced = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]))
        yield [(min(a, b), max(a, b)) for a, b in faced if a is not None and b is not None]
        seats.insert(1, seats.pop())


def slow_links(seconds: Mapping[Pair, float], members: Sequence[Member]) -> Iterator[Pair]:
    """Those well under the median of their kind, the slowest first."""
    for kind in _LINKS:
        of_kind = {pair: took for pair, took in seconds.items() if _kind(pair, members) == kind}
        if len(of_kind) >= _FEW:
            limit = statistics.median(of_kind.values()) / _SLOW
            yield from sorted((pair for pair, took in of_kind.items() if took > limit), key=lambda pair: -of_kind[pair])


def usual(seconds: Mapping[Pair, float], members: Sequence[Member], kind: str) -> Pair:
    """The median link of a kind."""
    of_kind = sorted((took, pair) for pair, took in seconds.items() if _kind(pair, members) == kind)
    return of_kind[(len(of_kind) - 1) // 2][1]


def _kind(pair: Pair, members: Sequence[Member]) -> str:
    return "intra" if members[pair[0]].node == members[pair[1]].node else "inter"


def _gathered(mine: Mapping[Pair, float]) -> dict[Pair, float]:
    """Of both ends, the one that took longer."""
    together: dict[Pair, float] = {}
    for part in everyones(dict(mine)):
        for pair, took in part.items():
            together[pair] = max(took, together.get(pair, 0.0))
    return together


def _pair_lines(
    cluster: ClusterConfig, seconds: Mapping[Pair, float], again: Mapping[Pair, float], members: Sequence[Member], size: int
) -> Iterator[Line]:
    make = warn if cluster.device.startswith("CPU") else fail
    for kind, where in _LINKS.items():
        of_kind = {pair: took for pair, took in seconds.items() if _kind(pair, members) == kind}
        if not of_kind:
            continue
        median = statistics.median(of_kind.values())
        limit = max(median, again.get(usual(seconds, members, kind), 0.0)) / _SLOW  # the machine may have got busier meanwhile
        still = {pair: again[pair] for pair in of_kind if pair in again and again[pair] > limit}
        rate = lambda took: f"{size / took / 1e9:.3g} GB/s"
        best, worst = min(of_kind.values()), max(took for pair, took in of_kind.items() if pair not in still)
        value = f"{len(of_kind)} tried, {rate(worst)} to {rate(best)}, median {rate(median)}"
        if not still:
            yield ok(KIND, f"links {where}", value)
            continue
        named = some(f"{members[a]} - {members[b]} {rate(took)}" for (a, b), took in sorted(still.items(), key=lambda item: -item[1]))
        do = "uptime: who else uses these cores?" if cluster.device.startswith("CPU") else _LOOK_AT[kind]
        if common := _common(still):
            do = f"all of them end at {members[common[0]]}; {do}"
        yield make(KIND, f"links {where}", f"slow: {named}; the others have {rate(median)}", do)


def _common(slow: Mapping[Pair, float]) -> list[int]:
    """The rank that all of several slow links end at, if there is one."""
    ends = [set(pair) for pair in slow]
    return sorted(set.intersection(*ends)) if len(ends) > 1 else []
