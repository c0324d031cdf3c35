"""Experts moved in memory: every tensor that an optimizer keeps of them is what a permutation of whole experts gives."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.schema import OptimConfig
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.optimizer.make import make_optimizer
from shoestring.parallel.optimizer.zero import Chunk, Spec
from shoestring.parallel.relocate import relocate, segments
from torch import nn

EXPERTS = 8
SHAPES = {"layers.0.experts.up": (5, 3), "layers.0.experts.down": (7, 11), "layers.1.experts.up": (5, 3), "layers.0.attn": (13, 9)}
SOURCES = {
    "layers.0.experts.": [3, 1, 0, 7, 5, 4, 2, 6],  # one stays, two change places, others go round
    "layers.1.experts.": [4, 5, 6, 7, 0, 1, 2, 3],  # all go to another rank, whatever ep is
    "layers.9.experts.": [7, 6, 5, 4, 3, 2, 1, 0],  # another pipeline stage's
}


@pytest.fixture(scope="module", autouse=True)
def deepspeed_in_parent():
    deepspeed_zero.preload()  # once, before the forks


# ---------------------------------------------------------------- which elements go where


@st.composite
def cuts_and_permutations(draw):
    experts, unit = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    numel, ranks = experts * unit, draw(st.integers(1, 5))
    borders = sorted(draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1)))
    borders = [0, *borders, numel]
    order = draw(st.permutations(range(ranks)))  # of ranks along the tensor
    return {order[i]: (borders[i], borders[i + 1] - borders[i]) for i in range(ranks)}, draw(st.permutations(range(experts))), numel


@given(cuts_and_permutations())
def test_segments_are_the_permutation(case):
    pieces, source, numel = case
    unit, before = numel // len(source), list(range(numel))
    after = list(before)
    for s in segments(pieces, source, numel):
        for rank, at in ((s.rank, s.start), (s.to_rank, s.to_start)):
            offset, length = pieces[rank]
            assert offset <= at and at + s.length <= offset + length, "not this rank's to read or write"
        assert s.length > 0 and s.start // unit != s.to_start // unit, "nothing to do"
        after[s.to_start : s.to_start + s.length] = before[s.start : s.start + s.length]
    assert after == [i for slot in source for i in before[slot * unit : (slot + 1) * unit]]


# ---------------------------------------------------------------- engines


def build(engine, dtype, layout, unit):
    """An optimizer whose state has in each element a number that tells which it is, and this rank's specs."""
    edp, ep = layout
    rank = dist.get_rank()
    replicas = [dist.new_group([d * ep + e for d in range(edp)]) for e in range(ep)][rank % ep]
    specs = []
    for name, shape in SHAPES.items():
        expert, numel = ".experts." in name, math.prod(shape) * (EXPERTS if ".experts." in name else 1)
        param = nn.Parameter(torch.zeros((EXPERTS // ep, *shape) if expert else shape, dtype=dtype))
        offset = rank % ep * param.numel() if expert else 0
        group = replicas if expert else dist.group.WORLD
        specs.append(Spec(name=name, param=param, group=group, numel=numel, offset=offset, matrices=(shape,) if expert and unit else ()))
    optimizer = make_optimizer(OptimConfig(lr=0.0, engine=engine, moments="fp32"), specs)
    for key, c in optimizer.state().items():
        c.data.copy_(number(key, c.numel)[c.offset : c.offset + len(c.data)])
    optimizer.load_state(7)
    return optimizer, specs


def number(key, numel):
    return torch.arange(numel) + 1000.0 * (len(key) + key.count("1"))


def moved(engine, dtype, layout, unit):
    optimizer, specs = build(engine, dtype, layout, unit)
    relocate(optimizer, SOURCES, dist.group.WORLD)
    assert optimizer.steps == 7
    chunks = {key: (c.numel, c.offset, c.data.clone()) for key, c in optimizer.state().items()}
    return chunks, {s.name: (s.offset, s.param.detach().flatten().clone()) for s in specs}


LAYOUTS = [((1, 4), False), ((2, 2), False), ((4, 1), False), ((2, 2), True)]  # (edp, ep); True: pieces end where an expert ends
ENGINES = [("whole", torch.float32), ("whole", torch.bfloat16), ("deepspeed", torch.bfloat16)]


@pytest.mark.parametrize("engine, dtype, layout, unit", [(*e, *x) for e in ENGINES for x in LAYOUTS if not (e[0] == "deepspeed" and x[1])])
def test_everything_moves(engine, dtype, layout, unit):
    ranks, seen = fork_ranks(4, moved, engine, dtype, layout, unit, timeout_s=60), {}
    for chunks, _ in ranks:
        for key, (numel, offset, data) in chunks.items():
            seen.setdefault(key, torch.full((numel,), -1.0))[offset : offset + len(data)] = data
    second = [key for key in seen if key.endswith(".exp_avg_sq")]
    assert len(seen) - len(second) == 2 * len(SHAPES) and len(second) == (1 if unit else len(SHAPES))  # Muon has none
    for key, got in seen.items():
        want, source = number(key, len(got)), next((s for prefix, s in SOURCES.items() if key.startswith(prefix)), None)
        if source is not None:
            want = want.view(EXPERTS, -1)[source].flatten()
        assert torch.equal(got, want), key
    for _, weights in ranks:
        for name, (offset, data) in weights.items():
            assert torch.equal(data, seen[f"{name}.master"][offset : offset + len(data)].to(dtype)), f"{name}: not published"


class OddOptimizer:
    """Any tensor under the experts' names moves: here one of bytes, cut unevenly, of which rank 2 owns nothing, and one with a gap."""

    def __init__(self, specs, gap):
        self.specs, self.steps, self.loads = {s.name: s for s in specs}, 3, []
        low, high = [(0, 5), (5, 7), (7, 7), (7, 24)][dist.get_rank()]
        self.data = torch.arange(low, high, dtype=torch.uint8)
        self.chunks = {"layers.0.experts.up.scale": Chunk(24 + gap, low, self.data)} if high > low else {}

    def state(self):
        return self.chunks

    def load_state(self, steps):
        self.loads.append(steps)


def odd(gap):
    optimizer = OddOptimizer([Spec(name="w", param=nn.Parameter(torch.zeros(1)), group=dist.group.WORLD, numel=1)], gap)
    relocate(optimizer, SOURCES, dist.group.WORLD)
    return optimizer.data, optimizer.loads


def test_any_tensor_moves():
    ranks = fork_ranks(4, odd, 0)
    want = torch.arange(24).view(EXPERTS, 3)[SOURCES["layers.0.experts."]].flatten()
    assert torch.cat([data for data, _ in ranks]).tolist() == want.tolist()
    assert all(loads == [3] for _, loads in ranks), "weights are published on every rank, once"


def test_a_gap_is_refused():
    with pytest.raises(RankFailed, match=r"layers.0.experts.up.scale: of 32 elements ranks \[0, 1, 2, 3\] own .* cannot move"):
        fork_ranks(4, odd, 8)
