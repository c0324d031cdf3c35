"""Every layout computes what one process computes: loss, global norm, all gradients, moments and weights over three steps.

The oracle is the same engine in one process, which `tests/train/test_engine.py` holds against `transformers` and torch's AdamW.
"""

import functools

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine

STEPS, LR = 3, 1e-3
BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=64", "model.dense_hidden_dim=96", "model.expert_hidden_dim=48",
    "train.global_batch_tokens=256", "train.micro_batch_sequences=1", "optim.z_loss_coef=1e-3", "optim.sequence_balance_coef=1e-2",
    "optim.clip=0.5",
]  # fmt: skip

#  What biases are added before the first step, by expert: which experts tokens choose.
ROUTING = {
    "natural": lambda e, n, k: 0.0,  # uneven, as an untrained router is
    "idle rank": lambda e, n, k: -10.0 if e >= n // 2 else 0.0,  # the upper half of the ranks receives nothing
    "idle expert": lambda e, n, k: -10.0 if e == 5 else 0.0,
    "pinned": lambda e, n, k: 10.0 if e in (0, 1, n - 4, n - 3) else 0.0,  # always these four of two groups: no near-tie can decide
}


def job(c, routing):
    """This rank's record of each step, and every piece of gradient (after scaling, before clipping), moment, weight and bias it owns."""
    engine = Engine(c)
    m, size, dp = c.model, c.train.micro_batch_sequences, c.parallel.dp
    engine.biases += torch.tensor([ROUTING[routing](e, m.num_experts, m.top_k) for e in range(m.num_experts)])
    records, gradients = [], {}
    take_step = engine.optimizer.step

    def step(norm, lr):
        if hasattr(engine.optimizer, "_pieces"):  # engine `whole`
            for p in engine.optimizer._pieces:
                gradients[f"{p.spec.name}.grad{engine.optimizer.steps}"] = (p.spec.numel, p.offset, p.grad.clone())
        return take_step(norm, lr)

    engine.optimizer.step = step
    for number in range(STEPS):
        size_of_all = c.sequences_per_step, c.data.seq_len + 1 + m.mtp_depth
        rows = torch.randint(m.vocab_size, size_of_all, generator=torch.Generator().manual_seed(number))
        mine = [rows[(i * dp + engine.mesh.dp_rank) * size :][:size] for i in range(c.num_micro_batches)]
        inputs = lambda r: r[:, : c.data.seq_len]
        result = engine.train_step([MicroBatch(tokens_BS=inputs(r), targets_BN=r[:, 1:]) for r in mine], LR)
        r = result
        losses = r.loss + sum(r.mtp_losses)
        records.append((losses, r.grad_norm, r.clip_coef, r.balance_loss, r.z_loss, r.router_entropy, r.loads))
    held = [MicroBatch(tokens_BS=inputs(r), targets_BN=r[:, 1:], counted=False) for r in mine]
    loss, tokens, _ = engine.evaluate(held)
    state = {name: (c.numel, c.offset, c.data.clone()) for name, c in engine.chunks(saving=True).items()}
    return records, gradients | state, loss / tokens


def gather(ranks):
    """(records, whole tensors, evaluation). Ranks must agree, and each element must have one owner."""
    whole, owners = {}, {}
    for records, pieces, held in ranks:
        assert all(a[:6] == b[:6] and torch.equal(a[6], b[6]) for a, b in zip(records, ranks[0][0])) and held == ranks[0][2]
        for name, (numel, offset, data) in pieces.items():
            whole.setdefault(name, torch.zeros(numel, dtype=data.dtype))[offset : offset + len(data)] = data
            owners.setdefault(name, torch.zeros(numel, dtype=torch.int8))[offset : offset + len(data)] += 1
    assert all((o == 1).all() for o in owners.values()), "an element has no owner, or two"
    return ranks[0][0], whole, ranks[0][2]


@functools.cache
def reference(overrides, routing):
    return gather(fork_ranks(1, job, load([*BASE, *overrides]), routing))


def run(layout, overrides, routing):
    config = load([*BASE, *overrides, *(f"parallel.{word}" for word in layout.split())])
    if config.optim.engine == "deepspeed":
        deepspeed_zero.preload()  # once, and not in every rank
    return gather(fork_ranks(config.parallel.world_size, job, config, routing))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def compare(got, want, *, loss, norm, tensors, weights):
    for (l1, n1, c1, b1, z1, e1, loads1), (l2, n2, c2, b2, z2, e2, loads2) in zip(got[0], want[0]):
        assert abs(l1 / l2 - 1) <= loss and abs(n1 / n2 - 1) <= norm and abs(c1 / c2 - 1) <= norm
        assert abs(b1 - b2) <= norm * b2 and abs(z1 - z2) <= norm * z2 and abs(e1 - e2) <= norm * e2
        assert torch.equal(loads1, loads2), "another choice of experts"
    assert abs(got[2] / want[2] - 1) <= loss, "evaluation"
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        if name.endswith(".master"):
            assert (value - want[1][name]).abs().max() <= weights, name
        elif name.endswith(".bias"):
            assert torch.equal(value, want[1][name]), name
        else:
            assert relative(value, want[1][name]) <= (2 * tensors if name.endswith("_sq") else tensors), name


FP32 = dict(loss=1e-6, norm=1e-6, tensors=1e-5, weights=1e-2 * LR * STEPS)
FP64 = dict(loss=1e-13, norm=1e-12, tensors=1e-11, weights=1e-10)

LAYOUTS = [
    "pp=2", "ep=2", "edp=2",
    "pp=4", "ep=4", "edp=4", "pp=2 ep=2", "pp=2 edp=2", "edp=2 ep=2",
    "pp=2 chunks=2 schedule=interleaved_1f1b ep=2",
    "pp=2 edp=2 ep=2", "pp=4 ep=2", "pp=2 ep=4", "edp=4 ep=2", "ep=8",
    "pp=2 chunks=2 schedule=interleaved_1f1b edp=2 ep=2",
    "pp=2 chunks=2 schedule=zbv ep=2", "pp=2 chunks=2 schedule=dualpipev ep=2",
    "pp=2 schedule=dualpipe ep=2", "pp=2 schedule=dualpipe edp=2",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(layout):
    compare(run(layout, [], "natural"), reference((), "natural"), **FP32)


@pytest.mark.parametrize("routing", ["idle rank", "idle expert"])
@pytest.mark.parametrize("layout", ["ep=2", "pp=2 ep=2", "edp=2 ep=4"])
def test_nothing_to_receive(layout, routing):
    got, want = run(layout, [], routing), reference((), routing)
    compare(got, want, **FP32)
    idle = got[0][0][6][:, 8:] if routing == "idle rank" else got[0][0][6][:, 5]
    assert (idle == 0).all()


@pytest.mark.parametrize(
    "layout", ["pp=2 ep=2", "pp=2 chunks=2 schedule=interleaved_1f1b", "edp=2 ep=2", "pp=2 chunks=2 schedule=zbv", "pp=2 schedule=dualpipe"]
)
def test_tied_embeddings(layout):
    """The embedding's copies on the first and the last stage are one parameter: reduced over both, counted once."""
    options = ["model.tie_embeddings=true"]
    compare(run(layout, options, "natural"), reference(tuple(options), "natural"), **FP32)


@pytest.mark.parametrize(
    "layout",
    [
        "pp=2 ep=2",
        "pp=2 chunks=2 schedule=interleaved_1f1b",
        "pp=4 edp=2",
        "edp=2 ep=2",
        "pp=2 schedule=dualpipe",
        "pp=2 chunks=2 schedule=zbv",
    ],
)
def test_multi_token_prediction(layout):
    """Two modules after the head, with the embedding's other copy: reduced over both ends, counted once."""
    options = ["model.mtp_depth=2", "precision=fp64"]
    compare(run(layout, options, "natural"), reference(tuple(options), "natural"), **FP64)


HIERARCHICAL = ["ep=4 dispatcher=hierarchical", "pp=2 chunks=2 schedule=dualpipev ep=4 dispatcher=hierarchical"]  # another order of sums


@pytest.mark.parametrize("layout", ["pp=2 edp=2 ep=2", "pp=4 chunks=1 ep=2", *HIERARCHICAL])
def test_fp64(layout):
    """The sharpest eye: a mistake of one part in 1e10 in any gradient shows."""
    compare(run(layout, ["precision=fp64"], "natural"), reference(("precision=fp64",), "natural"), **FP64)


@pytest.mark.parametrize("layout", ["pp=2", "ep=2", "pp=2 edp=2 ep=2"])
def test_bf16(layout):
    """Pinned routing, since BF16 rounding decides near-ties. What differs is the rounding of products whose shapes differ: BF16 keeps
    8 bits, so one rounding is 2^-9 = 2e-3 relative, and a gradient has passed through tens of them."""
    options = ["precision=bf16", "optim.bias_update_speed=0"]
    compare(run(layout, options, "pinned"), reference(tuple(options), "pinned"), loss=1e-3, norm=1e-2, tensors=3e-2, weights=2 * LR * STEPS)


@pytest.mark.parametrize("layout", ["pp=2 ep=2", "edp=2 ep=2", "pp=2 schedule=dualpipe"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_deepspeed_engine(layout, compute):
    """Engine `deepspeed` on a layout against engine `whole` in one process."""
    options, routing = [f"precision={compute}", "optim.bias_update_speed=0"], "pinned" if compute == "bf16" else "natural"
    got, want = run(layout, [*options, "optim.engine=deepspeed"], routing), reference(tuple(options), routing)
    want = want[0], {name: value for name, value in want[1].items() if ".grad" not in name}, want[2]
    bf16 = dict(loss=1e-3, norm=1e-2, tensors=3e-2, weights=2 * LR * STEPS)
    compare(got, want, **(FP32 if compute == "fp32" else bf16))


@pytest.mark.parametrize("model", ["model.num_dense_layers=4", "model.num_dense_layers=0", "model.num_shared_experts=0"])
def test_other_models(model):
    """All dense (no router anywhere), no dense block, no shared expert."""
    compare(run("pp=2 ep=2", [model], "natural"), reference((model,), "natural"), **FP32)
