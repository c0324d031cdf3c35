"""Experts that move between ranks while training: the same losses, flatter ranks; stopped, resumed and resharded with their places."""

import os

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.relocate import Placement
from shoestring.train import trainer
from shoestring.train.checkpoint.checkpointer import read_extra
from shoestring.train.checkpoint.folder import find_latest
from shoestring.train.engine import Engine
from shoestring.train.metrics import read_records

STEPS, LR = 4, 1e-3
BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=3", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=256", "train.micro_batch_sequences=2", "train.steps=5",
    "optim.warmup_steps=2", "train.eval_sequences=4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def deepspeed_in_parent():
    deepspeed_zero.preload()  # once, before the forks


# ---------------------------------------------------------------- against the run whose experts stay


def skewed(overrides, interval):
    """Steps from biases that make four experts popular, and put two on one rank; what this rank computed, and received in each step."""
    c = load([*BASE, *overrides, f"parallel.placement_interval={interval}"])
    engine, dp, size = Engine(c), c.parallel.dp, c.train.micro_batch_sequences
    engine.biases += torch.tensor([0.3 if e % 8 < 2 else 0.0 for e in range(c.model.num_experts)])
    dispatcher, steps, received = next(iter(engine.stages.values())).dispatcher, [], []
    wait_counts = dispatcher.wait_counts

    def counted(r):
        wait_counts(r)
        received[-1] += sum(r.received_rows)

    dispatcher.wait_counts = counted
    for step in range(STEPS):
        received.append(0)
        rows = torch.randint(c.model.vocab_size, (c.sequences_per_step, c.data.seq_len + 2), generator=torch.Generator().manual_seed(step))
        mine = rows.view(-1, dp, size, rows.shape[1])[:, engine.mesh.dp_rank]
        result = engine.train_step([MicroBatch(tokens_BS=r[:, :-2], targets_BN=r[:, 1:]) for r in mine], LR)
        steps.append((result.loss, result.grad_norm, result.loads))
    dispatcher.wait_counts = wait_counts
    held = engine.evaluate([MicroBatch(tokens_BS=r[:, :-2], targets_BN=r[:, 1:], counted=False) for r in mine])
    state = {name: (c.numel, c.offset, c.data.clone()) for name, c in engine.chunks(saving=True).items()}
    return steps, received, held, state, engine.placement.expert_at


def by_expert(ranks):
    """Whole tensors, experts in order, whatever slots they are in. (Block 0 is dense: layer 1 is row 0 of the table.)"""
    tensors, expert_at = {}, ranks[0][4]
    for _, _, _, state, _ in ranks:
        for name, (numel, offset, data) in state.items():
            tensors.setdefault(name, torch.full((numel,), torch.nan, dtype=data.dtype))[offset : offset + len(data)] = data
    for name, data in tensors.items():
        if ".experts." in name:
            slots = expert_at[int(name.split(".")[1]) - 1].argsort()
            tensors[name] = data.view(len(slots), -1)[slots].flatten()
    return tensors


def overload(ranks):
    """Of each step: rows that the busiest rank received over the mean."""
    received = torch.tensor([rank[1] for rank in ranks]).double()
    return (received.max(0).values / received.mean(0)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        "precision=fp32",
        "precision=bf16 model.mtp_depth=1 train.recompute=[attention,experts] optim.algorithm=muon optim.ema_decay=0.9 optim.offload=true",
    ],
)
def test_bit_identical_and_flatter(options):
    """Bit for bit, while nothing is clipped: an expert's rows are in the same order wherever it lives, and a token's copies are added in
    the order of its choices, so only the global norm is another sum."""
    words = ["parallel.ep=4", "optim.clip=1e9", *options.split()]
    stay, move = (fork_ranks(4, skewed, words, interval) for interval in (0, 2))
    for (l1, n1, loads1), (l2, n2, loads2) in zip(stay[0][0], move[0][0]):
        assert l1 == l2 and n1 == pytest.approx(n2, rel=1e-6) and torch.equal(loads1, loads2)
    assert stay[0][2] == move[0][2], "evaluation"
    want, got = by_expert(stay), by_expert(move)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert all(torch.equal(rank[4], move[0][4]) for rank in move) and not torch.equal(move[0][4], stay[0][4])
    before, after = overload(stay), overload(move)
    assert before[:2] == after[:2] and min(before) > 1.5 and max(after[2:]) < 1.25


@pytest.mark.parametrize("layout", ["pp=2 parallel.ep=2", "edp=2 parallel.ep=2 optim.engine=deepspeed"])
def test_same_losses_under_clipping(layout):
    words = [*f"parallel.{layout}".split(), "optim.clip=0.5"]
    stay, move = (fork_ranks(4, skewed, words, interval) for interval in (0, 2))
    for (l1, n1, loads1), (l2, n2, loads2) in zip(stay[0][0], move[0][0]):
        assert l1 == pytest.approx(l2, rel=1e-6) and n1 == pytest.approx(n2, rel=1e-5) and torch.equal(loads1, loads2)
    assert not torch.equal(move[0][4], stay[0][4])
    want, got = by_expert(stay), by_expert(move)
    for name in (name for name in want if name.endswith(".master")):
        assert (got[name] - want[name]).abs().max() <= 1e-2 * LR * STEPS, name


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def words(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda name, *more: [*BASE, f"data.cache_dir={cache}", f"run_dir={tmp_path / name}", *more]


def session(overrides):
    fork_ranks(load(overrides).parallel.world_size, train, overrides)
    records = read_records(os.path.join(load(overrides).run_dir, "metrics.jsonl"))
    extra = read_extra(find_latest(trainer.Path(load(overrides).run_dir) / "checkpoints"))
    return [(r.step, r.loss, r.grad_norm, r.bias_norm, r.expert_load) for r in records], extra


def train(overrides):
    trainer.run(load(overrides), torch.device("cpu"), log=lambda line: None)


def test_stopped_and_resumed(words):
    """Bit for bit, with a move every three steps: stopped in the middle of what is measured, and right after a move."""
    layout = ["parallel.ep=2", "parallel.placement_interval=3", "optim.clip=0.5"]
    want, extra = session(words("whole", *layout))
    assert set(extra["placement"]) == {"1", "2"} and all(row != sorted(row) == list(range(16)) for row in extra["placement"].values())
    assert sum(map(sum, extra["placement_loads"])) == 2 * sum(map(sum, want[-1][4])), "of the two steps since the move"
    run = words("stopped", *layout)
    for stop in (2, 1):
        session([*run, f"train.stop_after={stop}"])
    assert session(run) == (want, extra)


def test_resumed_on_another_layout(words):
    """Slots are consecutive on a rank under any ep, and the table comes with the tensors; where moving is off, experts stay moved."""
    want, extra = session(words("stays", "parallel.ep=2"))
    assert "placement" not in extra, "who never moves has no table"
    run, tables = words("moved", "train.stop_after=2"), []
    for layout in ("ep=4 parallel.placement_interval=2", "ep=2 parallel.placement_interval=2", "ep=1"):
        got, extra = session([*run, *f"parallel.{layout}".split()])
        tables.append(extra["placement"])
    for (step, loss, norm, bias_norm, loads), expected in zip(got, want):
        assert loss == pytest.approx(expected[1], rel=1e-6) and norm == pytest.approx(expected[2], rel=1e-5)
        assert (step, bias_norm, loads) == (expected[0], expected[3], expected[4])
    assert tables[0] != tables[1] == tables[2]


def test_a_table_that_is_none():
    placement = Placement(load([*BASE, "parallel.ep=2"]), torch.device("cpu"))
    row = list(range(16))
    with pytest.raises(ValueError, match="placement of layers 2: does not name each of 16 experts once"):
        placement.load_state({"placement": {"1": row, "2": [0, *row[:-1]]}, "placement_loads": [row, row]})
    placement.load_state({})
    assert placement.slot_of == {} and placement.state() == {}, "no look-up where nothing moves"
