"""Both engines against one process with torch's own AdamW, Muon and clip_grad_norm_, over layouts of up to eight ranks.

The gradients are made so that any layout can compute them: noise that is a function of (parameter, step, share of the global batch),
plus a pull that depends on the weights, so that an error in one step feeds into the next. Their sizes differ a thousandfold between
parameters: a norm that misses one, or counts one twice, is far off.
"""

import ast
import itertools
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.schema import OptimConfig
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.optimizer.make import make_optimizer
from shoestring.parallel.optimizer.whole import ALIGNMENT, WholeOptimizer, all_cuts, even_cuts, unit_cuts
from shoestring.parallel.optimizer.zero import Spec, in_collective_order, squared_norm
from torch import nn

SHARES = 4  # of the global batch, dealt out over dp
OPTIM = OptimConfig(lr=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, moments="fp32")
LR = (1e-2, 3e-3, 1e-2, 2e-2)  # differs between steps
LAYOUTS = [  # (pp, edp, ep)
    (1, 1, 1),  # one process: groups of one
    (1, 2, 2),  # experts sharded and replicated
    (1, 1, 4),  # experts not replicated at all
    (1, 4, 1),  # experts replicated like everything else
    (2, 1, 2),  # two stages, with a parameter tied across them
    (2, 2, 1),
]


@dataclass(frozen=True)
class Toy:
    """A parameter of the toy model; sizes that no partition divides. A stage of None: tied, on the first and the last."""

    shape: tuple[int, ...]
    stage: int | None
    size: float = 1.0  # of its gradients
    expert: bool = False
    rows: tuple[int, ...] = ()  # of the matrices in a unit, for Muon

    @property
    def matrices(self):
        return tuple((rows, self.shape[-1]) for rows in self.rows)


TOYS = {
    "embed": Toy((101, 36), None, 0.3),
    "layers.0.norm": Toy((36,), 0, 20.0),
    "layers.0.attn": Toy((144, 36), 0, 0.1, rows=(100, 36, 8)),  # fused: tall, square, wide
    "layers.0.experts.up": Toy((8, 48, 36), 0, 5.0, expert=True, rows=(24, 24)),
    "layers.1.norm": Toy((7,), 1, 0.01),  # fewer elements than ranks x alignment: most ranks own none
    "layers.1.attn": Toy((131, 36), 1, 1.0, rows=(131,)),
    "layers.1.experts.down": Toy((8, 36, 24), 1, 8.0, expert=True, rows=(36,)),
}


@pytest.fixture(scope="module", autouse=True)
def deepspeed_in_parent():
    deepspeed_zero.preload()  # once, before the forks


# ---------------------------------------------------------------- the toy model


def decays(name):
    return "norm" not in name


def initial(name):
    return torch.randn(TOYS[name].shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.1


def share_grad(name, weights, step, share, stage, rows=slice(None)):
    """This share's gradient of `name` made on `stage` (a tied parameter has two), for the experts in `rows`, FP64."""
    toy = TOYS[name]
    noise = torch.randn(toy.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {step} {share} {stage}".encode())))
    return toy.size * (0.02 * noise[rows].double() + 0.05 * weights.double())


class Mesh:
    def __init__(self, layout):
        pp, edp, ep = layout
        rank, dp, per = dist.get_rank(), edp * ep, SHARES // (edp * ep)
        self.pp, self.ep, row, self.column = pp, ep, rank // ep % edp, rank % ep
        self.stages = [rank // dp] if pp > 1 else [0, 1]
        dense = [dist.new_group(range(p * dp, (p + 1) * dp)) for p in range(pp)]
        expert = [[dist.new_group([p * dp + i * ep + e for i in range(edp)]) for e in range(ep)] for p in range(pp)]
        self.dense, self.expert, self.tied = dense[rank // dp], expert[rank // dp][self.column], dist.new_group(range(pp * dp))
        self.dense_shares = range(rank % dp * per, (rank % dp + 1) * per)
        self.expert_shares = range(row * ep * per, (row + 1) * ep * per)  # what an all-to-all brings

    def specs(self, dtype, algorithm="adamw"):
        specs = []
        for name, toy in TOYS.items():
            if toy.stage is None or toy.stage in self.stages:
                full = initial(name)
                local = full.chunk(self.ep)[self.column] if toy.expert else full
                specs.append(
                    Spec(
                        name=name,
                        param=nn.Parameter(local.to(dtype).contiguous()),
                        numel=full.numel(),
                        offset=self.column * local.numel() if toy.expert else 0,
                        group=self.tied if toy.stage is None and self.pp > 1 else self.expert if toy.expert else self.dense,
                        stage=self.stages[0] if toy.stage is None else toy.stage,
                        decay=decays(name),
                        matrices=toy.matrices if algorithm == "muon" else (),
                    )
                )
        # The tied parameter comes last on the last stage, as a head would: the order of groups differs between ranks.
        return specs[1:] + specs[:1] if self.stages == [1] else specs

    def backward(self, specs, step):
        for s in specs:
            toy = TOYS[s.name]
            rows = slice(s.offset * toy.shape[0] // s.numel, (s.offset + s.param.numel()) * toy.shape[0] // s.numel)
            for share in self.expert_shares if toy.expert else self.dense_shares:
                for stage in self.stages if toy.stage is None else [toy.stage]:
                    s.param.main_grad += share_grad(s.name, s.param.detach(), step, share, stage, rows).to(s.param.main_grad.dtype)


def reference(dtype, steps, optim=OPTIM):
    """One process and torch only: {name: master}, {"name.exp_avg": moment}, norms. Each matrix is a parameter of torch's Muon."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masters = {n: initial(n).to(dtype).to(wide) for n in TOYS}
    grads = {n: torch.zeros_like(m) for n, m in masters.items()}
    muon, adamw = {}, {}
    for n, m in masters.items():
        rows = TOYS[n].rows if optim.algorithm == "muon" else ()
        parts = [t.view(-1, *TOYS[n].shape[-2:]).split(rows, 1) for t in (m, grads[n])] if rows else [[m[None]], [grads[n][None]]]
        for part, grad in zip(*parts):
            for leaf, g in zip(part, grad):
                leaf = nn.Parameter(leaf)
                leaf.grad = g
                (muon if rows else adamw).setdefault(n, []).append(leaf)
    groups = [{"params": p, "weight_decay": optim.weight_decay * decays(n)} for n, (p,) in adamw.items()]
    optimizers = [torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)]
    if muon:
        matrices, options = itertools.chain(*muon.values()), dict(momentum=optim.muon_momentum, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(matrices, weight_decay=optim.weight_decay, **options))
    norms = []
    for step in range(steps):
        for n, m in masters.items():
            stages = (0, 1) if TOYS[n].stage is None else (TOYS[n].stage,)
            shares = [share_grad(n, m.to(dtype), step, k, s) for k in range(SHARES) for s in stages]
            grads[n].copy_(sum(shares) / SHARES)
        norms.append(clip_(grads.values(), optim.clip))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LR[step]
            optimizer.step()
        if optim.moments == "auto" and dtype == torch.bfloat16:  # what a rounded moment is, whoever keeps it
            for leaf in adamw.values():
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = optimizers[0].state[leaf[0]][key]
                    moment.copy_(moment.bfloat16())
    moments = {f"{n}.{key}": optimizers[0].state[p[0]][key] for n, p in adamw.items() for key in ("exp_avg", "exp_avg_sq")}
    for n, leaves in muon.items():
        means, units = [optimizers[1].state[p]["momentum_buffer"] for p in leaves], math.prod(TOYS[n].shape[:-2])
        moments[f"{n}.exp_avg"] = torch.cat([m for unit in range(units) for m in means[unit::units]])
    return masters, moments, norms


def clip_(grads, limit):
    """`clip_grad_norm_` of bare gradients."""
    holders = [nn.Parameter(torch.empty_like(g)) for g in grads]
    for holder, grad in zip(holders, grads):
        holder.grad = grad
    return nn.utils.clip_grad_norm_(holders, limit).item()


def train(layout, build, dtype, steps, by_stage=False, algorithm="adamw"):
    """Body of a rank: its pieces, its weights, the norms and clip coefficients."""
    mesh = Mesh(layout)
    specs = mesh.specs(dtype, algorithm)
    optimizer, record = build(specs), []
    for step in range(steps):
        for stage in reversed(mesh.stages) if by_stage else [None]:  # the last stage is reduced while the first still computes
            mesh.backward([s for s in specs if stage in (None, s.stage)], step)
            optimizer.reduce(stage)
        norm = optimizer.norm(1 / SHARES)
        record.append((norm.item(), optimizer.step(norm, LR[step]).item()))
        assert all(g.count_nonzero() == 0 for g in optimizer.main_grad.values())
        assert all(s.param.main_grad.data_ptr() == optimizer.main_grad[s.name].data_ptr() for s in specs)
    pieces = {k: (c.numel, c.offset, c.data.clone()) for k, c in optimizer.state().items()}
    return pieces, {s.name: (s.offset, s.param.detach().clone()) for s in specs}, record


def run(layout, engine, dtype, steps=4, optim=OPTIM, **options):
    """Whole state tensors and record. Every element must have had one owner, every replica the owner's weights, all one record."""
    build = engine if callable(engine) else lambda specs: make_optimizer(replace(optim, engine=engine), specs)
    options |= {"algorithm": optim.algorithm}
    ranks = fork_ranks(math.prod(layout), lambda: train(layout, build, dtype, steps, **options), timeout_s=60)
    whole, owners = {}, {}
    for pieces, _, record in ranks:
        assert record == ranks[0][2], "ranks disagree about the norm or the clip coefficient"
        for key, (numel, offset, data) in pieces.items():
            whole.setdefault(key, torch.zeros(numel, dtype=data.dtype))[offset : offset + len(data)] = data
            owners.setdefault(key, torch.zeros(numel))[offset : offset + len(data)] += 1
    keys = ["master", "exp_avg", "exp_avg_sq", *["ema"] * bool(optim.ema_decay)]
    muon = lambda name: optim.algorithm == "muon" and TOYS[name].rows
    assert whole.keys() == {f"{n}.{k}" for n in TOYS for k in keys if k != "exp_avg_sq" or not muon(n)}
    assert all((o == 1).all() for o in owners.values()), "an element has no owner, or two"
    for name, (offset, weights) in (item for r in ranks for item in r[1].items()):
        master = whole[f"{name}.master"][offset : offset + weights.numel()]
        assert torch.equal(weights.flatten(), master.to(weights.dtype)), f"{name}: a replica's weights are not the owner's"
    return whole, ranks[0][2]


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- against one process


def compare(got, want, tolerance, of_moments=None):
    (state, record), (masters, moments, norms) = got, want
    for name in TOYS:
        assert error(state[f"{name}.master"], masters[name].flatten()) < tolerance, name
    for key, moment in moments.items():
        assert error(state[key], moment.flatten()) < (of_moments or 5 * tolerance), key
    for (norm, coefficient), expected in zip(record, norms):
        assert norm == pytest.approx(expected, rel=tolerance)
        assert coefficient == pytest.approx(min(1, OPTIM.clip / expected), rel=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # BF16: a weight that falls on the other side of a rounding border changes the next gradient.
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-5)],
)
def test_equals_one_process(layout, engine, dtype, tolerance):
    compare(run(layout, engine, dtype), reference(dtype, 4), tolerance)


@pytest.mark.parametrize("layout", [(1, 2, 2), (2, 1, 2)])
def test_bf16_moments(layout):
    """FP32 masters over BF16 moments. A moment on the other side of a rounding border is 2^-8 off, and few are."""
    optim = replace(OPTIM, moments="auto")
    got = run(layout, "whole", torch.bfloat16, optim=optim)
    assert {t.dtype for k, t in got[0].items() if "exp_avg" in k} == {torch.bfloat16}
    compare(got, reference(torch.bfloat16, 4, optim), 2e-5, of_moments=5e-4)


MUON = replace(OPTIM, algorithm="muon")
# Newton-Schulz in BF16: an input on the other side of a rounding border moves the update by 2^-9, and that by a hundredth of the weight.
MUON_TOLERANCE = 1e-3


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_equals_one_process(layout, dtype):
    optim = replace(MUON, moments="auto")
    compare(run(layout, "whole", dtype, optim=optim), reference(dtype, 4, optim), MUON_TOLERANCE, of_moments=1e-3)


def test_muon_in_fp64_has_no_rounding_to_amplify():
    """Torch's Muon always rounds to BF16, so here two layouts are compared."""
    (one, _), (four, _) = (run(layout, "whole", torch.float64, optim=MUON) for layout in ((1, 1, 1), (1, 2, 2)))
    assert max(error(four[k], one[k]) for k in one) < 1e-12


@pytest.mark.parametrize("engine, algorithm", [("whole", "adamw"), ("whole", "muon"), ("deepspeed", "adamw")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_nothing(engine, algorithm, dtype):
    """The same arithmetic elsewhere. Two ranks to a sum and no clip: only the order of the norm's sum, and where kernels' vectors end."""
    optim = replace(OPTIM, algorithm=algorithm, clip=1e9, moments="auto")
    here, there = (run((1, 2, 1), engine, dtype, steps=3, optim=replace(optim, offload=offload)) for offload in (False, True))
    assert max(error(there[0][k], here[0][k]) for k in here[0]) < 1e-7
    assert [a for a, _ in there[1]] == pytest.approx([a for a, _ in here[1]], rel=1e-6)


@pytest.mark.parametrize("layout", [(1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
def test_offload_equals_one_process(layout, engine):
    compare(run(layout, engine, torch.float32, optim=replace(OPTIM, offload=True)), reference(torch.float32, 4), 1e-6)


def test_fp64_equals_one_process():
    masters, _, norms = reference(torch.float64, 4)
    state, record = run((2, 1, 2), "whole", torch.float64)
    assert max(error(state[f"{n}.master"], masters[n].flatten()) for n in TOYS) < 1e-14
    assert [norm for norm, _ in record] == pytest.approx(norms, rel=1e-14)


def test_small_norms_are_not_clipped():
    optim = replace(OPTIM, clip=1e6)
    masters, _, _ = reference(torch.float32, 2, optim)
    state, record = run((1, 2, 2), "whole", torch.float32, steps=2, optim=optim)
    assert [coefficient for _, coefficient in record] == [1.0, 1.0]
    assert max(error(state[f"{n}.master"], masters[n].flatten()) for n in TOYS) < 1e-6


# ---------------------------------------------------------------- the norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
def test_norm_counts_every_element_once(layout, engine):
    """Each element's reduced gradient is a known constant of its parameter, so the norm has a closed form."""

    def body():
        mesh = Mesh(layout)
        specs = mesh.specs(torch.float32)
        optimizer = make_optimizer(replace(OPTIM, engine=engine), specs)
        for s in specs:
            s.param.main_grad.fill_(TOYS[s.name].size / dist.get_world_size(s.group))
        optimizer.reduce()
        return optimizer.norm(3.0).item()

    expected = 3.0 * math.sqrt(sum(math.prod(t.shape) * t.size**2 for t in TOYS.values()))
    for norm in fork_ranks(math.prod(layout), body, timeout_s=60):
        assert norm == pytest.approx(expected, rel=1e-6)


def test_norm_of_long_vectors():
    """Plain FP32 accumulation is 1e-4 off here; rows, a tail, and tensors shorter than a row."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (8_000_001, 100, 16384, 1)]
    expected = sum(t.double().square().sum().item() for t in tensors)
    assert squared_norm(tensors, torch.device("cpu")).item() == pytest.approx(expected, rel=2e-7)


# ---------------------------------------------------------------- equal to each other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 1, 2)])
def test_engines_are_equal(layout, dtype):
    """A sum of two ranks has no order, and a clip of 1e9 keeps the norm's last bit out.

    So what differs between reduction kinds is nothing, and between engines, which cut elsewhere, the last bit: torch's AdamW rounds
    otherwise in the last few elements of a tensor, which it does not vectorise.
    """
    optim = replace(OPTIM, clip=1e9)
    whole, deepspeed, one_call = (
        run(layout, engine, dtype, steps=3, optim=optim)[0]
        for engine in ("whole", "deepspeed", lambda specs: WholeOptimizer(specs, optim, in_one_call=True))
    )
    assert all(torch.equal(whole[k], one_call[k]) for k in whole)
    assert max(error(deepspeed[k], whole[k]) for k in whole) < 1e-7


@pytest.mark.parametrize("layout", [(1, 1, 4), (2, 2, 1)])
def test_one_call_equals_one_process(layout):
    """The reduce-scatter and all-gather that GPUs use."""
    masters, _, norms = reference(torch.bfloat16, 4)
    state, record = run(layout, lambda specs: WholeOptimizer(specs, OPTIM, in_one_call=True), torch.bfloat16)
    assert max(error(state[f"{n}.master"], masters[n].flatten()) for n in TOYS) < 2e-5
    assert [norm for norm, _ in record] == pytest.approx(norms, rel=2e-5)


@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
def test_reduction_by_stage_in_any_order(engine):
    at_once = run((1, 2, 1), engine, torch.float32, steps=2)
    by_stage = run((1, 2, 1), engine, torch.float32, steps=2, by_stage=True)
    assert at_once[1] == by_stage[1] and all(torch.equal(v, by_stage[0][k]) for k, v in at_once[0].items())


def test_groups_meet_in_one_order():
    """Two parameters tied across the same ranks, and one of each rank's own, in another order on each rank."""

    def body():
        rank, (a, b) = dist.get_rank(), (dist.new_group([0, 1]), dist.new_group([0, 1]))
        own = [dist.new_group([r]) for r in range(2)][rank]
        specs = [small(name="z", group=own), small(name="tied.a", group=a), small(name="tied.b", group=b)]
        buckets = {(s.name,): [s] for s in (reversed(specs) if rank else specs)}
        dist.barrier()  # a rank that leaves while the other still connects breaks its groups
        return in_collective_order(buckets)

    first, last = fork_ranks(2, body, timeout_s=60)
    assert first.index(("tied.a",)) < first.index(("tied.b",)) and last.index(("tied.a",)) < last.index(("tied.b",))
    assert first.index(("z",)) == 0 and last.index(("z",)) == 2  # by ranks: [0] < [0, 1] < [1]


def test_no_matrix_is_parted():
    for pieces, _, _ in fork_ranks(4, lambda: train((1, 2, 2), lambda s: make_optimizer(MUON, s), torch.float32, 1, algorithm="muon")):
        for key, (_, offset, data) in pieces.items():
            toy = TOYS[key.rsplit(".", 1)[0]]
            size = math.prod(toy.shape[-2:]) if toy.rows else 1
            assert offset % size == len(data) % size == 0, f"{key} was parted at {offset} or {offset + len(data)}"


# ---------------------------------------------------------------- cuts


@given(total=st.integers(1, 10**12), ranks=st.integers(1, 2048))
def test_even_cuts(total, ranks):
    cuts = even_cuts(total, ranks)
    shares = {b - a for a, b in itertools.pairwise(cuts)}
    assert len(cuts) == ranks + 1 and cuts[0] == 0 and len(shares) == 1 and shares.pop() % ALIGNMENT == 0
    assert total <= cuts[-1] < total + ranks * ALIGNMENT


@given(
    stages=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    ranks=st.integers(1, 9),
)
def test_unit_cuts(stages, ranks):
    """Stages of runs of (units, elements of a unit, cost of a unit)."""
    load, largest, total = [0] * ranks, 0, 0
    for runs in stages:
        cuts, work = unit_cuts(runs, load)
        cost_at, cost = {0: 0}, 0  # border -> cost before it
        for units, size, price in runs:
            for _ in range(units):
                cost += price
                cost_at[max(cost_at) + size] = cost
        assert cuts == sorted(cuts) and len(cuts) == ranks + 1 and cuts[0] == 0 and cuts[-1] == max(cost_at)
        assert set(cuts) <= cost_at.keys(), "a cut inside a unit"
        assert work == [cost_at[high] - cost_at[low] for low, high in itertools.pairwise(cuts)]
        load = [a + b for a, b in zip(load, work)]
        largest, total = max(largest, *(price for *_, price in runs)), total + cost
    if len(stages) == 1:
        assert max(load) <= total / ranks + largest


def test_work_is_balanced_over_stages_and_groups():
    """Dense weights replicated four times, experts twice. Ranks of a group agree about its cuts, and none waits long for another."""
    wide, square = (16, 512), (128, 128)  # the second has twice the elements of the first, and 16 times its work
    dense = [[wide] * 16 + [square] * 8, [square]]  # by stage: one to cut by work, one that only one rank can have
    price = {shape: math.prod(shape) * min(shape) for shape in (wide, square)}

    def body():
        mesh = Mesh((1, 2, 2))

        def spec(name, shape, group, stage):
            param = nn.Parameter(torch.empty(shape, device="meta"))
            return Spec(name=name, param=param, group=group, numel=math.prod(shape), stage=stage, matrices=(shape[-2:],))

        buffers = []
        for stage, shapes in enumerate(dense):
            buffers.append([spec(f"{stage}.dense{i}", shape, mesh.dense, stage) for i, shape in enumerate(shapes)])
            buffers.append([spec(f"{stage}.experts", (32, *wide), mesh.expert, stage)])
        cuts, work = all_cuts(buffers), [0, 0]
        for specs, borders in zip(buffers, cuts):
            mine, at = dist.get_rank(specs[0].group), 0
            for s in specs:
                for _ in range(s.param.numel() // s.unit):
                    if borders[mine] <= at < borders[mine + 1]:
                        work[specs[0].group is mesh.expert] += price[s.matrices[0]]
                    at += s.unit
        return cuts, work, dist.get_process_group_ranks(mesh.expert)

    ranks = fork_ranks(4, body, timeout_s=60)
    assert all(cuts[::2] == ranks[0][0][::2] for cuts, *_ in ranks), "ranks disagree about dense weights"
    assert all(cuts == ranks[replicas[0]][0] for cuts, _, replicas in ranks), "ranks disagree about experts"
    of_dense = [work[0] for _, work, _ in ranks]
    assert max(of_dense) <= sum(of_dense) / 4 + price[square]
    for first, second in ((0, 2), (1, 3)):
        difference = sum(ranks[first][1]) - sum(ranks[second][1])
        assert abs(difference) <= 2 * price[wide], "experts do not make up for what a rank has of dense weights"


# ---------------------------------------------------------------- misuse


def one_rank(body, *args):
    """body on one rank; the message of what it raises."""
    with pytest.raises(RankFailed) as failed:
        fork_ranks(1, body, *args, timeout_s=60)
    return str(failed.value)


def small(**changes):
    return Spec(**{"name": "w", "param": nn.Parameter(torch.ones(4, 2)), "group": dist.group.WORLD, "numel": 8, **changes})


@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
@pytest.mark.parametrize(
    "calls, message",
    [
        (lambda o: (o.reduce(), o.reduce(0)), "reduce(0) in step 0: of stages [0], [] remain"),
        (lambda o: o.reduce(3), "reduce(3) in step 0: of stages [0], [0] remain"),
        (lambda o: o.norm(1.0), "stages [0] were not reduced"),
        (lambda o: (o.reduce(), o.norm(1.0), o.norm(1.0)), "called twice"),
        (lambda o: (o.reduce(), o.step(torch.ones(()), 0.1)), "step() before norm()"),
    ],
)
def test_wrong_order_is_refused(engine, calls, message):
    assert message in one_rank(lambda: calls(make_optimizer(replace(OPTIM, engine=engine), [small()])))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"param": nn.Parameter(torch.ones(4, 2).half())}, "w: weights of torch.float16"),
        ({"param": nn.Parameter(torch.ones(2, 4).t())}, "w: weights must be contiguous"),
        ({"offset": 4}, "w: a slab of 8 at 4 does not fit into 8"),
        ({"matrices": ((1, 3),)}, "w: slab of 8 at 0 is not made of units of 3"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    assert message in one_rank(lambda: make_optimizer(OPTIM, [small(**changes)]))


def test_more_impossible_specs():
    double = small(name="v", param=nn.Parameter(torch.ones(4, 2).double()))
    assert "named twice: w" in one_rank(lambda: make_optimizer(OPTIM, [small(), small()]))
    assert "FP64 weights on their own" in one_rank(lambda: make_optimizer(OPTIM, [small(), double]))
    deepspeed = replace(OPTIM, engine="deepspeed")
    assert "cannot hold v (torch.float64, unit 1): use optim.engine=whole" in one_rank(lambda: make_optimizer(deepspeed, [double]))
    assert "must be one of whole, deepspeed" in one_rank(lambda: make_optimizer(replace(OPTIM, engine="sgd"), [small()]))


@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
def test_autograd_leaves_main_gradients_alone(engine):
    """Gradients that autograd puts into param.grad are the model's business, not the engine's."""

    def body():
        spec = small()
        optimizer = make_optimizer(replace(OPTIM, engine=engine), [spec])
        spec.param.sum().backward()
        assert spec.param.grad.sum() == 8 and spec.param.main_grad.count_nonzero() == 0
        spec.param.main_grad += spec.param.grad
        spec.param.grad = None
        optimizer.reduce()
        return optimizer.norm(1.0).item()

    assert fork_ranks(1, body, timeout_s=60) == [pytest.approx(math.sqrt(8))]


def test_deepspeed_is_imported_by_few_files_and_only_when_chosen():
    """Importing it takes seconds: a function does it. The engine is one file, what holds DeepSpeed's AutoEP to the certificate another."""
    root = Path(deepspeed_zero.__file__).parents[2]
    found = set()
    for file in (f for folder in ("conf", "kernels", "parallel", "train", "launch") for f in root.joinpath(folder).rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                found |= {(file.name, node in tree.body) for m in modules if m.split(".")[0] == "deepspeed"}
    assert found == {("deepspeed_zero.py", False), ("autoep.py", False)}
