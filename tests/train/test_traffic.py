"""Bytes that a rank sends: formulas against what real ranks hand over in one step, and expectations against all choices there are."""

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.fabric import Fabric, Link
from shoestring.parallel.groups import partitions
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.trace import Tracer
from shoestring.train.engine import Engine
from shoestring.train.rank_share import rank_share, stage_layers
from shoestring.train.traffic import Rows, even_rows, rank_traffic, reached

# Widths that are no multiple of 16 bytes in FP8, and nodes of two.
BASE = [
    "model=tiny", "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.num_layers=5", "train.global_batch_tokens=1024",
    "train.micro_batch_sequences=2", "train.eval_sequences=16", "cluster.gpus_per_node=2",
]  # fmt: skip
LAYOUTS = {
    "1f1b": ["parallel.pp=2", "parallel.ep=2", "precision=bf16"],
    "expert replicas": ["parallel.edp=2", "parallel.ep=4", "precision=fp32"],
    "by nodes": ["parallel.ep=4", "parallel.dispatcher=hierarchical", "precision=bf16"],
    "by nodes, fp8": ["parallel.ep=4", "parallel.dispatcher=hierarchical", "precision=fp8"],
    "by nodes, fp64": ["parallel.ep=4", "parallel.dispatcher=hierarchical", "precision=fp64"],
    "dualpipe, fp8": ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "precision=fp8", "model.mtp_depth=1"],
    "dualpipev": ["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.chunks=2", "model.mtp_depth=2"],
    "tied, both ends apart": ["parallel.pp=2", "parallel.edp=2", "parallel.ep=2", "model.tie_embeddings=true", "model.mtp_depth=1"],
    "interleaved, no experts' exchange": ["parallel.pp=2", "parallel.edp=2", "parallel.schedule=interleaved_1f1b", "parallel.chunks=2"],
}  # fmt: skip
RINGS = ("reduce", "gather", "scalars")


class Counting(Fabric, Tracer):
    """A transport that counts by the phase that sends, and knows the rows of each leg on their way to experts."""

    def __init__(self, rank, gpus):
        super().__init__(rank, [r // gpus for r in range(dist.get_world_size())], intra=Link(), inter=Link())
        self.name, self.sent, self.rows = "counts", Counter(), {}

    @contextmanager
    def counted(self, name):
        before, outer, self.name = self.sent_bytes, self.name, name
        yield
        self.name = outer
        for link, total in self.sent_bytes.items():
            self.sent[name, link] += total - before[link]

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        if self.name == "dispatch F":
            leg = self.rows.setdefault(group.group_desc, (Counter(), Counter()))
            for totals, splits in zip(leg, (sent, received)):
                totals.update(dict(enumerate(splits)))
        if self.name == "counts":
            with self.counted("counts"):
                return super().all_to_all(out, rows, group)
        return super().all_to_all(out, rows, group, received=received, sent=sent)

    def isend(self, tensor, rank, group):
        with self.counted("pipeline"):
            return super().isend(tensor, rank, group)

    def pack(self, op, phase):
        return self.counted(f"{phase} {'F' if op.kind == 'F' else 'B'}")


def step(words):
    """(bytes by name and link, bytes that rings pass on by name, rows) of one step of this rank."""
    config, rings, real = load([*BASE, *words]), Counter(), {n: getattr(dist, n) for n in ("reduce", "broadcast", "all_reduce")}
    transport = Counting(dist.get_rank(), config.cluster.gpus_per_node)
    engine = Engine(config, transport=transport)
    engine.executor.tracer = transport

    def watched(name, as_what, share):
        def call(tensor, *args, group=None, **kw):
            owner = kw.get("group_dst", kw.get("group_src"))
            rings[as_what] += tensor.nbytes * share(owner == dist.get_rank(group), dist.get_world_size(group))
            return real[name](tensor, *args, group=group, **kw)

        setattr(dist, name, call)

    # An owner's share is passed on by all others; in an all-reduce a rank passes on all shares but one, twice.
    watched("reduce", "reduce", lambda own, n: not own)
    watched("broadcast", "gather", lambda own, n: not own)
    watched("all_reduce", "scalars", lambda own, n: 2 * (n - 1) / n)
    extra = config.data.seq_len + 1 + config.model.mtp_depth
    rows = torch.randint(300, (config.num_micro_batches * 2, extra), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.train_step([MicroBatch(tokens_BS=r[:, :16], targets_BN=r[:, 1:]) for r in rows.split(2)], 1e-3)
    legs = {name: [[totals[i] for i in range(len(totals))] for totals in leg] for name, leg in transport.rows.items()}
    return transport.sent, rings, legs


def as_rows(legs):
    sent = {
        f"{leg}{way}": rows for name, both in legs.items() for leg in [name.removeprefix("ep F").strip()] for way, rows in zip("SR", both)
    }
    by_nodes = "insideS" in sent
    sizes = ("acrossS", "acrossR", "insideS", "insideR") if by_nodes else ("S", "R")
    return Rows(**dict(zip(("sent", "received", "inside_sent", "inside_received"), (sent[size] for size in sizes)))) if legs else None


def in_place(config, rank):
    p = config.parallel
    return rank // p.dp, {"edp_rank": rank % p.dp // p.ep, "ep_rank": rank % p.ep}


@pytest.mark.parametrize("words", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_sends_what_the_formulas_say(words):
    config = load([*BASE, *words])
    for rank, (sent, rings, legs) in enumerate(fork_ranks(config.parallel.world_size, step, words)):
        pp_rank, place = in_place(config, rank)
        expected = rank_traffic(config, pp_rank, **place, rows=as_rows(legs))
        assert {key: n for key, n in expected.items() if key[0] not in RINGS} == dict(+sent)
        by_name = {name: sum(n for (other, _), n in expected.items() if other == name) for name in RINGS}
        assert by_name == pytest.approx({name: rings[name] for name in RINGS}, rel=1e-12)


def test_muon_shares_out_what_adamw_does():
    """Owners' ranges are uneven: what all ranks send together is exact."""
    words = ["parallel.pp=2", "parallel.edp=2", "optim.algorithm=muon"]
    config = load([*BASE, *words])
    ranks = [rings for _, rings, _ in fork_ranks(4, step, words)]
    expected = [rank_traffic(config, in_place(config, rank)[0]) for rank in range(4)]
    for name in ("reduce", "gather"):
        total = sum(n for sent in expected for (other, _), n in sent.items() if other == name)
        assert total == pytest.approx(sum(rings[name] for rings in ranks), rel=1e-12)


# ---------------------------------------------------------------- rings, and who is in them


def test_a_ring_crosses_as_often_as_there_are_nodes():
    """Eight replicas on two nodes of four: of a ring's eight hops two cross. On one node none does."""
    words = [*BASE, "parallel.edp=8", "precision=fp32", "train.global_batch_tokens=4096"]
    two, one = (rank_traffic(load([*words, f"cluster.gpus_per_node={gpus}"]), 0) for gpus in (4, 8))
    assert {name for name, link in one if link == "inter"} == set()
    for name in RINGS:
        assert two[name, "inter"] == pytest.approx((two[name, "inter"] + two[name, "intra"]) / 4)
        assert two[name, "inter"] + two[name, "intra"] == pytest.approx(one[name, "intra"])


@pytest.mark.parametrize("schedule, chunks", [("1f1b", 1), ("dualpipe", 1), ("dualpipev", 2), ("interleaved_1f1b", 2)])
def test_a_share_is_what_the_mesh_and_the_stages_are(schedule, chunks):
    words = [f"parallel.schedule={schedule}", f"parallel.chunks={chunks}", "parallel.pp=2", "parallel.edp=2", "parallel.ep=2"]
    config = load([*BASE, *words, "model.mtp_depth=1", "train.global_batch_tokens=2048"])
    parts, layers, p = partitions(config.parallel, embeds_at_head=True), stage_layers(config), config.parallel
    for pp_rank in range(2):
        share, own = rank_share(config, pp_rank), pp_rank * p.dp
        assert share.stages == {s: layers[s] for s in share.stages}
        for name, pp_ranks in (("dense", share.alike), ("embedding", share.ends)):
            group = next((ranks for ranks in parts.get(name, []) if own in ranks), [])
            assert [r for s in pp_ranks for r in range(s * p.dp, (s + 1) * p.dp)] == group
        ways = len(share.placements)
        for stage in share.stages:
            runs = [share.micro_batches(stage, 7, way) for way in range(ways)]
            dealt = [sum(i * ways // 7 == way for i in range(7)) for way in range(ways)]
            assert runs == [n * (share.placements[way][stage] == pp_rank) for way, n in enumerate(dealt)]


# ---------------------------------------------------------------- expectations


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_reached_is_the_share_of_all_choices(data):
    groups = data.draw(st.sampled_from([1, 2, 3, 4]))
    size = data.draw(st.integers(1, 12 // groups))
    limited = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(4, limited * size)))
    part = data.draw(st.integers(0, groups * size))
    hits = total = 0
    for chosen in itertools.combinations(range(groups), limited):
        experts = [g * size + i for g in chosen for i in range(size)]
        for copies in itertools.combinations(experts, top_k):
            hits, total = hits + (min(copies) < part), total + 1
    assert reached(groups * size, part, top_k, groups, limited) == pytest.approx(hits / total, rel=1e-12)


def test_even_rows_of_deepseek_v3():
    """Of 8 nodes at most 4 have experts for a token, on average 3.63. Inside them it has a copy for each of its 8 experts."""
    words = ["model=deepseek_v3", "cluster=h800", "precision=fp8", "parallel=deepseek_v3", "data=synthetic", "data.seq_len=4096",
             "train.global_batch_tokens=62914560", "train.eval_sequences=128"]  # fmt: skip
    flat, by_nodes = (even_rows(load([*words, f"parallel.dispatcher={name}"])) for name in ("alltoall", "hierarchical"))
    assert flat.sent == [4096 * 8 / 64] * 64
    assert sum(by_nodes.sent) / 4096 == pytest.approx(3.629, abs=1e-3)
    assert sum(by_nodes.inside_sent) == sum(flat.sent)
