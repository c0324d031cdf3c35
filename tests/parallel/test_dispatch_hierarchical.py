"""Tokens by way of nodes: what arrives is what `alltoall` brings, what returns is summed in each node first, and what crosses between
nodes is one row per token and node. Experts are a formula of slot and row, so that every rank can tell what any expert makes of its tokens.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.schema import ParallelConfig
from shoestring.kernels.fp8_rows import Fp8Rows
from shoestring.kernels.permute import sum_copies
from shoestring.launch.local import fork_ranks
from shoestring.parallel.dispatch import Routing, make_dispatcher
from shoestring.parallel.groups import Mesh
from shoestring.parallel.phases import Pending
from shoestring.parallel.transport import Transport

E, K, D = 16, 4, 16
CASES = [  # ranks, ranks of a node, precision
    *((4, 2, precision) for precision in ("fp64", "fp32", "bf16", "fp8")),
    (8, 2, "fp32"), (8, 4, "fp8"),  # as many nodes as a token has experts, whose order rounding tells; and fewer
    (4, 4, "bf16"), (2, 8, "fp8"),  # one node, and only a part of one
    (4, 1, "bf16"),  # every rank is a node
]  # fmt: skip
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def choices(rank, g):
    """(T, K) slots of every kind of routing, as many tokens as this rank has."""
    num = lambda usual: 0 if rank == 1 else usual + rank  # rank 1 has no tokens at all
    scores = torch.rand(num(20), E, generator=g)
    yield "natural", scores.topk(K).indices
    yield "the same for all", torch.arange(K).expand(num(9), -1).contiguous()
    yield "one node, the last", scores[:, E - K :].topk(K).indices + E - K
    yield "nobody to the upper half", scores[:, : E // 2].topk(K).indices
    yield "in turn to the halves", scores[:, : E // 2].topk(K).indices + E // 2 * (torch.arange(num(20)) % 2)[:, None]
    yield "an expert twice", scores.topk(K).indices[:, [0, 0, 1, 2]]
    yield "only rank 0 has tokens", scores.topk(K).indices[: 20 * (rank == 0)]


def output(slot, rows):
    """What expert `slot` makes of its rows. In BF16 its last bits matter to the order of sums."""
    return (rows.float() * (1.37 + slot.float() / 7)[..., None]).to(rows.dtype)


def run_experts(rows, weight_R, r, first_slot):
    """And of weights; nobody's rows become NaN: who reads them shows."""
    slot_R = torch.arange(len(r.groups.sizes)).repeat_interleave(torch.tensor(r.groups.sizes)) + first_slot
    made = output(slot_R, rows)
    made[r.copy_of_R < 0] = torch.nan
    return made, None if weight_R is None else weight_R * (1 + slot_R)


def by_nodes(copies_TKD, node_TK, nodes):
    """Added in the order of K in each node, rounded, and likewise over nodes. Rounding is the kernel's: on ties, CPUs have two minds."""
    rounded = lambda parts_TND: sum_copies(parts_TND.flatten(0, 1), torch.arange(parts_TND[..., 0].numel()).view_as(parts_TND[..., 0]))
    return rounded(torch.stack([rounded(copies_TKD * (node_TK == node)[:, :, None]) for node in range(nodes)], 1))


class Recorder(Transport):
    """Remembers what this rank sent to whom: (ranks of the group, rows to each)."""

    def __init__(self):
        self.calls = []

    def all_to_all(self, out, rows, group, *, received=None, sent=None):
        shares = rows.split(sent or [len(rows) // group.size()] * group.size())
        self.calls.append((dist.get_process_group_ranks(group), [share.clone() for share in shares]))
        return super().all_to_all(out, rows, group, received=received, sent=sent)


def both_ways(node_size, dtype, fp8):
    """Both dispatchers side by side, forward and backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    by_node = Mesh.create(ParallelConfig(ep=ranks, dispatcher="hierarchical"), rank, gpus_per_node=node_size).ep
    plain = Mesh.create(ParallelConfig(ep=ranks, dispatcher="alltoall"), rank).ep
    align, own, node_slots = 128 if fp8 else 8, E // ranks, E // ranks * min(ranks, node_size)
    make = lambda name, groups, to: make_dispatcher(name, num_experts=E, align=align, groups=groups, fp8=fp8, transport=to)
    ours, theirs = make("hierarchical", by_node, recorder := Recorder()), make("alltoall", plain, Transport())
    same = lambda a, b: torch.equal(a.wide() if fp8 else a, b.wide() if fp8 else b)
    g = torch.Generator().manual_seed(rank)
    slot_of_E = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    for name, slot_TK in choices(rank, g):
        slot_of = slot_of_E if name == "natural" else None
        expert_TK = slot_of.argsort()[slot_TK] if slot_of is not None else slot_TK
        weight_TK = torch.rand(slot_TK.shape, generator=g, dtype=WIDE[dtype])
        a, b = Routing(expert_TK=expert_TK), Routing(expert_TK=expert_TK)
        for dispatcher, r in ((ours, a), (theirs, b)):
            dispatcher.start(r, slot_of)
            dispatcher.wait_counts(r)
        assert torch.equal(a.groups.ends_e, b.groups.ends_e) and torch.equal(a.load_E, b.load_E), name
        for direction in "FB":
            x_TD = torch.randn(len(slot_TK), D, generator=g).to(dtype)
            weight = weight_TK if direction == "F" else None
            rows, weight_R = ours.to_experts(x_TD, weight, a, direction).wait()
            wanted, wanted_R = theirs.to_experts(x_TD, weight, b, direction).wait()
            assert same(rows, wanted), f"{name}: dispatch {direction}"
            assert weight_R is wanted_R is None if weight is None else torch.equal(weight_R, wanted_R), name

            if isinstance(rows, Fp8Rows):
                continue  # what experts make is BF16 in any case
            made_RD, made_R = run_experts(rows, weight_R, a, rank * own)
            y_TD, back_TK = ours.to_tokens(made_RD, made_R, a, direction).wait()
            copies_TKD = output(slot_TK, x_TD[:, None].expand(-1, K, -1))
            assert torch.equal(y_TD, by_nodes(copies_TKD, slot_TK // node_slots, ranks)), f"{name}: combine {direction}"
            exact = copies_TKD.double().sum(1)
            limit = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
            assert ((y_TD - exact).abs() <= limit * copies_TKD.double().abs().sum(1)).all(), f"{name}: combine {direction}"
            assert back_TK is None if weight is None else torch.equal(back_TK, weight_TK * (1 + slot_TK)), f"{name}: weights"
    widths = {(share.dtype, share[0].nbytes) for _, shares in recorder.calls for share in shares if len(share)}
    assert not fp8 or all(width % 16 == 0 for dtype, width in widths if dtype == torch.uint8), "rows of bytes are whole units of 16"
    return True


@pytest.mark.parametrize("ranks, node_size, precision", CASES)
def test_the_same_rows_arrive_and_sums_return(ranks, node_size, precision):
    dtype = {"fp64": torch.float64, "fp32": torch.float32}.get(precision, torch.bfloat16)
    assert all(fork_ranks(ranks, both_ways, node_size, dtype, precision == "fp8"))


# ---------------------------------------------------------------- what crosses


def crossings(node_size):
    """For each routing: tokens sent to and rows returned to each other node, by its number; and what a token's experts say of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = Mesh.create(ParallelConfig(ep=ranks, dispatcher="hierarchical"), rank, gpus_per_node=node_size).ep
    recorder = Recorder()
    dispatcher = make_dispatcher("hierarchical", num_experts=E, align=8, groups=groups, transport=recorder)
    results = []
    for _, slot_TK in choices(rank, torch.Generator().manual_seed(rank)):
        r = Routing(expert_TK=slot_TK)
        dispatcher.start(r)
        dispatcher.wait_counts(r)
        assert len(recorder.calls) == 1, "one exchange of counts"
        recorder.calls.clear()
        x_TD = torch.arange(len(slot_TK)).float()[:, None].expand(-1, D).contiguous()
        rows_RD, _ = dispatcher.to_experts(x_TD, torch.rand(slot_TK.shape), r, "F").wait()
        dispatcher.to_tokens(rows_RD, None, r, "F").wait()
        outside = [{}, {}]
        for which, (peers, shares) in enumerate(recorder.calls):
            for peer, rows in zip(peers, shares):
                if peer // node_size != rank // node_size:
                    assert peer % node_size == rank % node_size and which in (0, 3), "only on the legs across, among equal places"
                    outside[which == 3][peer // node_size] = rows[:, 0].tolist()
        recorder.calls.clear()
        nodes = [node for node in range(ranks // node_size) if node != rank // node_size]
        wanted = {
            node: [t for t, row in enumerate(slot_TK.tolist()) if any(s // (E // ranks * node_size) == node for s in row)] for node in nodes
        }
        results.append((*outside, wanted))
    return results


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_token_crosses_once_to_each_node_that_wants_it(ranks):
    node_size = 2
    everywhere = fork_ranks(ranks, crossings, node_size)
    for rank, results in enumerate(everywhere):
        for number, (sent, returned, wanted) in enumerate(results):
            assert {node: sorted(tokens) for node, tokens in sent.items()} == wanted, f"rank {rank}: exactly those, each once"
            for node, rows in returned.items():
                source = node * node_size + rank % node_size
                assert len(rows) == len(everywhere[source][number][2][rank // node_size]), "a row back for each that came"
    assert any(len(tokens) > 5 for _, _, wanted in everywhere[0] for tokens in wanted.values())


# ---------------------------------------------------------------- parts


@settings(max_examples=100, deadline=None)
@given(data=st.data(), nodes=st.integers(1, 3), places=st.integers(1, 3), own=st.integers(1, 3), align=st.sampled_from([1, 4]))
def test_rows_of_what_arrives(data, nodes, places, own, align):
    """Against a list that is sorted."""
    counts = data.draw(st.lists(st.integers(0, 3), min_size=nodes * places * own, max_size=nodes * places * own))
    counts_Se = torch.tensor(counts).view(nodes * places, own)
    order = itertools.product(range(places), range(own), range(nodes))
    senders = [(expert, node * places + place) for place, expert, node in order]
    arriving = [(expert, sender, i) for expert, sender in senders for i in range(counts_Se[sender, expert])]
    rows = []
    for expert in range(own):
        share = sorted(copy for copy in arriving if copy[0] == expert)
        rows += share + [None] * (-len(share) % align)
    r = Routing(expert_TK=torch.empty(0, 1, dtype=torch.int64))
    r.place_received(counts_Se, counts_Se, align=align, nodes=nodes)
    assert [None if m < 0 else arriving[m] for m in r.copy_of_R.tolist()] == rows
    assert [rows[row] for row in r.row_of_M.tolist()] == arriving and r.groups.ends_e[-1] == len(rows)


def test_a_second_leg_is_sent_when_the_first_has_landed():
    seen = []

    class Work:
        def __init__(self, name):
            self.name = name

        def wait(self):
            seen.append(f"{self.name} landed")

    def leg(name):
        seen.append(f"{name} sent")
        return Pending(work=Work(name), finish=lambda: (name,))

    send_on = lambda name: leg(f"{name} 2").then(lambda inner: (inner, 1))
    pending = leg("a").then_issue(send_on).then(lambda *values: (*values, 2))
    assert seen == ["a sent"] and pending.wait() == ("a 2", 1, 2) and seen == ["a sent", "a landed", "a 2 sent", "a 2 landed"]
    advanced = leg("b").then_issue(send_on).then(lambda *values: (*values, 2)).advance()
    assert seen[-2:] == ["b landed", "b 2 sent"] and advanced.onward is None and advanced.wait() == ("b 2", 1, 2)
