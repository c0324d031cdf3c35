"""Rank and group arithmetic of layouts with up to 2,048 ranks, every rank played in turn: groups, pipeline flows, stages, expert slabs,
who owns which element of DeepSeek-V3 under each optimizer, and the action lists of its batches.

torch.distributed's questions about groups are answered by `World`; weights are on the meta device, where they have shapes and no bytes.
"""

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.phases import phases
from shoestring.conf.schema import ParallelConfig
from shoestring.kernels.ops import Ops
from shoestring.parallel import world as world_module
from shoestring.parallel.groups import Mesh, partitions
from shoestring.parallel.optimizer.whole import WholeOptimizer
from shoestring.parallel.schedule import SCHEDULES, validate
from shoestring.train import cost
from shoestring.train.engine import Engine
from shoestring.train.model.decoder import Stage, is_expert
from shoestring.train.model.moe import Balance
from shoestring.train.rank_share import stage_layers

PUBLISHED = {"pp": 16, "edp": 2, "ep": 64}
LAYOUTS = [
    PUBLISHED,
    PUBLISHED | {"schedule": "interleaved_1f1b", "chunks": 2},  # 32 stages: two links between the same two ranks
    {"pp": 16, "edp": 128, "ep": 1},  # expert groups of dp ranks, no exchange
    {"pp": 1, "edp": 8, "ep": 256},  # an expert a rank; no pipeline
    {"pp": 2, "edp": 1, "ep": 256, "schedule": "interleaved_1f1b", "chunks": 4},  # two ranks that are each other's both neighbours
    {"pp": 61, "edp": 4, "ep": 8},  # a layer a stage; 1,952 ranks, nothing a power of two
]


@dataclass(frozen=True, eq=False)
class Group:
    number: int  # of the call that made it
    ranks: list[int]
    members: frozenset[int]


@dataclass
class World:
    """Plays one rank at a time. Groups are those that the first rank played asked for: another list from another rank is an error."""

    size: int
    rank: int = 0
    calls: int = 0

    def __post_init__(self):
        self.made: list[Group] = []

    def play(self, rank):
        self.rank, self.calls = rank, 0

    def new_group(self, ranks, *, timeout, group_desc, pg_options):
        if self.calls == len(self.made):
            assert self.rank == 0, f"rank {self.rank} makes more groups than rank 0"
            self.made.append(Group(self.calls, ranks, frozenset(ranks)))
        group = self.made[self.calls]
        assert group.ranks == ranks, f"rank {self.rank}, group number {self.calls}"
        self.calls += 1
        return group if self.rank in group.members else dist.GroupMember.NON_GROUP_MEMBER


@pytest.fixture(scope="module")
def world():
    w = World(size=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", w.new_group)
        patch.setattr(world_module, "_on_gpu", lambda: False)
        patch.setattr(dist, "get_world_size", lambda group=None: w.size if group is None else len(group.ranks))
        patch.setattr(dist, "get_rank", lambda group=None: w.rank if group is None else group.ranks.index(w.rank))
        patch.setattr(dist, "get_process_group_ranks", lambda group: list(group.ranks))
        yield w


def meshes(world, parallel, ranks):
    """{rank: its mesh}, groups shared by them all."""
    world.size, world.made, made = parallel.world_size, [], {}
    for rank in sorted({0, *ranks}):
        world.play(rank)
        made[rank] = Mesh.create(parallel, rank, embeds_at_head=True)
        assert world.calls == len(world.made), f"rank {rank} makes fewer groups than rank 0"
    return made


@pytest.fixture(scope="module")
def published(world):
    """Meshes of all 2,048 ranks."""
    return meshes(world, ParallelConfig(**PUBLISHED), range(2048))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda c: "-".join(map(str, c.values())))
def test_every_rank_is_in_the_groups_that_its_coordinates_say(world, published, layout):
    """All ranks of the published layout; elsewhere the corners, the middle, and some at random."""
    p = ParallelConfig(**layout)
    grid = np.arange(p.world_size).reshape(p.pp, p.edp, p.ep)
    place = {int(grid[at]): at for at in np.ndindex(grid.shape)}
    corners = {place_[axis] for place_ in (grid[:, 0, 0], grid[0, :, 0], grid[0, 0]) for axis in (0, -1)} | {
        p.world_size // 2,
        p.world_size - 1,
    }
    some = {int(rank) for rank in corners} | {*random.Random(0).sample(range(p.world_size), 40)}
    ends = {SCHEDULES[p.schedule].place(p.pp, p.chunks)[0][end] for end in (0, -1)}
    shared = defaultdict(set)
    for rank, mesh in (published if layout is PUBLISHED else meshes(world, p, some)).items():
        s, d, e = place[rank]
        assert (mesh.pp_rank, mesh.edp_rank, mesh.ep_rank, mesh.dp_rank) == (s, d, e, d * p.ep + e)
        assert mesh.dense.ranks == grid[s].flatten().tolist()
        assert mesh.expert.ranks == grid[s, :, e].tolist()
        assert mesh.column == grid[:, d, e].tolist()
        assert [g.ranks for g in mesh.ep.values()] == [grid[s, d].tolist()] * (2 if p.ep > 1 else 0)
        assert all(g.ranks == mesh.column for g in mesh.flows.values()) and bool(mesh.flows) == (p.pp > 1)
        held = {"dense": mesh.dense, "expert": mesh.expert, **mesh.ep, **mesh.flows}
        assert len({g.number for g in held.values()}) == len(held), "two purposes share a communicator"
        assert (mesh.embed is not None) == (len(ends) == 2 and s in ends)
        if mesh.embed is not None:
            assert mesh.embed.ranks == grid[sorted(ends)].flatten().tolist()
        for kind, group in held.items():
            shared[kind, tuple(group.ranks)].add(group.number)
    assert {len(numbers) for numbers in shared.values()} == {1}, "ranks of one group hold different communicators for it"
    if layout is PUBLISHED:
        for kind in ("dense", "expert", "F", "B", *mesh.flows):
            parts = [ranks for k, ranks in shared if k == kind]
            assert sorted(itertools.chain(*parts)) == list(range(2048)), f"{kind} groups do not part the world"


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[4], LAYOUTS[5]], ids=["1f1b", "interleaved", "two ranks", "61 stages"])
def test_flows_link_the_ranks_of_neighbouring_stages(world, layout):
    """Both ends name the same communicator, and in it a pair of ranks has one link, of one direction."""
    p = ParallelConfig(**layout)
    dp_rank = p.dp - 1
    ranks = [s * p.dp + dp_rank for s in range(p.pp)]
    made = meshes(world, p, ranks)
    column = {rank: made[rank] for rank in ranks}
    held = {stage: rank for rank, mesh in column.items() for stage in mesh.my_stages}
    assert sorted(held) == list(range(p.num_stages)) and len(held) == sum(len(m.my_stages) for m in column.values())
    links = defaultdict(set)
    for s in range(p.num_stages - 1):
        for kind in "FB":
            (to, out), (back, into) = column[held[s]].flow(kind, s, s + 1, 0), column[held[s + 1]].flow(kind, s + 1, s, 0)
            assert (to, back) == (held[s + 1], held[s]) and out is into and {to, back} <= out.members
            pair = frozenset((to, back))
            assert pair not in links[out.number], f"stage {s}: two links of one pair in one communicator"
            links[out.number].add(pair)


#  schedule, chunks, pipeline flows of a rank (F and B, per direction, per leg), whether the ends of the pipeline are different ranks
FLOWS = [
    ("1f1b", 1, 2, True),
    ("interleaved_1f1b", 2, 4, True),
    ("zbv", 2, 4, False),
    ("dualpipev", 2, 4, False),
    ("dualpipe", 1, 4, False),
]


@pytest.mark.parametrize("dispatcher, exchanges", [("alltoall", 2), ("hierarchical", 5)])  # F, B; counts, and both across and inside
@pytest.mark.parametrize("schedule, chunks, flows, apart", FLOWS, ids=lambda v: str(v))
def test_how_many_groups_2048_ranks_make(dispatcher, exchanges, schedule, chunks, flows, apart):
    """With NCCL, a name of a partition is one collective call of the world, and at most one communicator of a rank: twelve at most."""
    p = ParallelConfig(**PUBLISHED | {"schedule": schedule, "chunks": chunks, "dispatcher": dispatcher})
    parts = partitions(p, embeds_at_head=True, gpus_per_node=8)
    assert len(parts) == 2 + exchanges + flows + apart <= 12
    in_how_many = defaultdict(int)
    for name, groups in parts.items():
        ranks = sorted(itertools.chain(*groups))
        assert ranks == sorted(set(ranks)), f"{name}: a rank is in two groups"
        assert name == "embedding" or ranks == list(range(2048))
        for rank in ranks:
            in_how_many[rank] += 1
    assert set(in_how_many.values()) == ({len(parts), len(parts) - 1} if apart else {len(parts)})


def test_how_many_groups_the_published_layout_makes(world):
    """16 dense + 1,024 expert + 2 x 32 exchanges + 2 x 128 pipelines + 1 embedding, which is what gloo is asked for."""
    meshes(world, ParallelConfig(**PUBLISHED), [0])
    assert len(world.made) == 16 + 1024 + 2 * 32 + 2 * 128 + 1
    of_rank = [sum(rank in g.members for g in world.made) for rank in (0, 1000)]
    assert of_rank == [1 + 1 + 2 + 2 + 1, 1 + 1 + 2 + 2]


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def config():
    return load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus]"])


def stages_of(config, mesh):
    """This pipeline rank's real stages, without memory. All its replicas may share them: an optimizer only re-points its parameters."""
    balance = Balance(sequence_coef=0.0, z_coef=0.0, token_weight=1.0)
    layers, made = stage_layers(config), {}
    for s in mesh.my_stages:
        is_last = s == mesh.num_stages - 1
        with torch.device("meta"):
            made[s] = Stage(
                config.model, layers=layers[s], is_first=s == 0, is_last=is_last, ep=config.parallel.ep, balance=balance,
                dtype=torch.bfloat16, dispatcher=None, ops=Ops(),
                shared_embed=made[0].embed if is_last and 0 in made else None,
            )  # fmt: skip
    return made


def test_stages_of_61_layers(config):
    """The published 16 stages, and every other number: each block once and in order, prediction with the head, none empty."""
    for pp in (1, 2, 7, 16, 32, 61):
        layers = stage_layers(replace(config, parallel=replace(config.parallel, pp=pp)))
        assert [block for stage in layers for block in stage] == list(range(62)) and len(layers) == pp and all(layers)
        assert 61 in layers[-1]


def seams(pieces, numel):
    """What is wrong with (low, high) pieces of [0, numel): nothing, where they tile it."""
    lows, highs = zip(*sorted(pieces))
    return [(high, low) for high, low in zip((0, *highs), (*lows, numel)) if high != low]


def test_every_expert_of_every_layer_is_on_one_expert_parallel_rank(config, published):
    """All 2,048 ranks' slabs, as the engine describes them to its optimizer."""
    stages, slabs = {}, defaultdict(set)
    for mesh in published.values():
        if mesh.pp_rank not in stages:
            stages[mesh.pp_rank] = stages_of(config, mesh)
        for spec in Engine._specs(SimpleNamespace(mesh=mesh, stages=stages[mesh.pp_rank], config=config)):
            if is_expert(spec.name):
                slabs[spec.name, spec.numel].add((spec.offset, spec.offset + spec.param.numel(), spec.group.number))
                assert spec.group is mesh.expert
    sizes = {"gate_up": 256 * 2 * 2048 * 7168, "down": 256 * 7168 * 2048}
    assert {name: numel for name, numel in slabs} == {
        f"layers.{layer}.experts.{kind}": n for layer in range(3, 62) for kind, n in sizes.items()
    }
    for (name, numel), parts in slabs.items():
        assert len(parts) == 64 and not seams([(low, high) for low, high, _ in parts], numel), name


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_every_element_of_deepseek_v3_has_one_owner(world, config, published, algorithm):
    """Pieces of all replicas of three pipeline ranks: both ends, which share the embedding among 256, and one between."""
    optim = replace(config.optim, algorithm=algorithm, ema_decay=0.0)
    config = replace(config, optim=optim)
    pp_ranks, owned, numels, stages = (0, 8, 15), defaultdict(list), {}, {}
    ranks = [s * 128 + r for s in pp_ranks for r in range(128)]
    for rank, mesh in ((rank, published[rank]) for rank in ranks):
        world.play(rank)
        if mesh.pp_rank not in stages:
            stages[mesh.pp_rank] = stages_of(config, mesh)
        specs = Engine._specs(SimpleNamespace(mesh=mesh, stages=stages[mesh.pp_rank], config=config))
        for key, chunk in WholeOptimizer(specs, optim).state().items():
            if key.endswith(".master"):
                owned[key].append((chunk.offset, chunk.offset + len(chunk.data)))
                numels[key] = chunk.numel
    units = {f"{s.name}.master": s.unit for s in specs}
    for key, pieces in owned.items():
        assert not seams(pieces, numels[key]), key
        assert all(low % units.get(key, 1) == 0 for low, _ in pieces), f"{key}: a matrix is parted"
    params, layers = cost.num_params(config.model), stage_layers(config)
    blocks = [*params.blocks, *params.predictions]
    held = sum(blocks[block].total for s in pp_ranks for block in layers[s])
    assert sum(numels.values()) == held + params.embedding + params.head + params.final_norm


# ---------------------------------------------------------------- schedules


def test_action_lists_of_every_batch_of_the_run(config):
    """24 to 120 micro-batches for each of 128 pipelines of 16 stages, 15 in the first extension and 5 in the second."""
    nums = {(phase.config.parallel.pp, phase.micro_batches(level.batch_tokens)) for phase in phases(config) for level in phase.levels}
    assert nums == {(16, n) for n in range(24, 121)} | {(16, 15), (16, 5)}
    for pp, num in sorted(nums)[::8] + [(16, 120)]:
        check_lists("1f1b", pp, 1, num)
    check_lists("interleaved_1f1b", 16, 2, 120 // 16 * 16)


def check_lists(schedule, pp, chunks, num):
    s = SCHEDULES[schedule]
    placements, lists = s.place(pp, chunks), s.actions(pp, chunks, num)
    validate(lists, placements, num)
    for rank, actions in enumerate(lists):
        ops = [op for action in actions for op in action]
        assert len(ops) == 2 * chunks * num and {placements[0][op.stage] for op in ops} == {rank}
        in_flight = np.cumsum([1 if op.kind == "F" else -1 for op in ops])
        assert chunks > 1 or in_flight.max() == min(num, pp - rank), "1F1B holds as many activations as there are stages to come"
