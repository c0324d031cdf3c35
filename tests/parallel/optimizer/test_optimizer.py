"""Whole training steps on pp 2 x edp 2 x ep 2 in FP32 and BF16, weight gradients run late, against `transformers` and torch's AdamW, Muon
and `clip_grad_norm_` in one process; what is refused; what state weighs.
"""

import dataclasses
import weakref
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.schema import OptimConfig
from shoestring.launch.local import fork_ranks
from shoestring.launch.validate import validate
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.optimizer.make import make_optimizer
from shoestring.parallel.optimizer.zero import Spec
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES, Op
from shoestring.parallel.schedule.ops import Held
from shoestring.train.engine import Engine
from shoestring.train.interop.hf_format import pieces, to_hf_config
from shoestring.train.step import Watch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

STEPS, LR = 3, 1e-3
CONFIG = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=48", "model.num_layers=3", "model.dense_hidden_dim=64",
    "model.expert_hidden_dim=24", "model.init_std=0.1", "train.global_batch_tokens=256", "train.micro_batch_sequences=1",
    "optim.sequence_balance_coef=0", "optim.clip=0.5", "optim.bias_update_speed=0", "optim.weight_decay=0.5", "optim.eps=1e-6",
]  # fmt: skip
LAYOUT = ["parallel.pp=2", "parallel.edp=2", "parallel.ep=2"]


def rows_of(config, step):
    g = torch.Generator().manual_seed(step)
    return torch.randint(config.model.vocab_size, (config.sequences_per_step, config.data.seq_len + 1), generator=g)


def late(pp, chunks, num):
    """1F1B whose weight gradients all run after the last backward, first in last out."""
    lists = []
    for actions in one_f_one_b.actions(pp, chunks, num):
        ops = [op._replace(kind="I") if op.kind == "B" else op for (op,) in actions]
        weights = [Op("W", op.stage, op.micro_batch) for op in reversed(ops) if op.kind == "I"]
        lists.append([(op,) for op in [*ops, *weights]])
    return lists


one_f_one_b = SCHEDULES["1f1b"]


@pytest.fixture(autouse=True)
def late_weight_gradients(monkeypatch):
    deepspeed_zero.preload()
    held = lambda pp, chunks, num: [Held(h.activations, num) for h in one_f_one_b.held(pp, chunks, num)]
    monkeypatch.setitem(SCHEDULES, "1f1b", dataclasses.replace(one_f_one_b, actions=late, held=held))


class Gradients(Watch):
    """Keeps each step's, before clipping."""

    def __init__(self):
        self.seen = {}

    def reduced(self, engine, norm):
        self.seen |= {f"{name}.grad{engine.optimizer.steps}": piece for name, piece in owned(engine.optimizer.gradients()).items()}


def owned(chunks):
    return {name: (c.numel, c.offset, c.data.clone()) for name, c in chunks.items()}


def ours(words, pinned=False):
    """A rank's {tensor: (numel, offset, data)} before and after three steps, with each step's gradients, the norms, and the weights that
    the model then computes with."""
    config, watch, norms = load([*CONFIG, *words]), Gradients(), []
    engine = Engine(config, watch=watch)
    if pinned:
        engine.biases += always_the_same(config.model)
    before = owned(engine.optimizer.state())
    for number in range(STEPS):
        mine = rows_of(config, number)[engine.mesh.dp_rank :: config.parallel.dp]
        batches = [MicroBatch(tokens_BS=r[None, :-1], targets_BN=r[None, 1:]) for r in mine]
        norms.append(engine.train_step(batches, LR).grad_norm)
    specs, weights = engine.optimizer.specs, engine.parameters()
    weights = {name: (s.numel, s.offset, weights[name].detach().flatten()) for name, s in specs.items()}
    return before, owned(engine.optimizer.state()) | watch.seen, norms, weights


def always_the_same(m):
    """(E,) biases that make these four experts of two groups every token's: no near-tie can decide."""
    return torch.tensor([10.0 if e in (0, 1, m.num_experts - 4, m.num_experts - 3) else 0.0 for e in range(m.num_experts)])


def whole(ranks):
    tensors = {}
    for part in ranks:
        for name, (numel, offset, data) in part.items():
            tensors.setdefault(name, torch.full((numel,), torch.nan, dtype=data.dtype))[offset : offset + len(data)] = data
    return tensors


def renamed(config, tensors, kind):
    """Our tensors of that kind, as theirs are called and shaped; experts are stacked."""
    parts = defaultdict(list)
    for p in pieces(config.model, stacked=True):
        if f"{p.weight}.{kind}" in tensors and not p.is_selection_bias:
            parts[p.name].append(tensors[f"{p.weight}.{kind}"][p.offset : p.offset + p.numel].view(p.shape))
    return {name: torch.stack(p) if ".mlp.experts." in name else p[0] for name, p in parts.items()}


def matrices(name, tensor, m):
    """The matrices that Muon updates: theirs are fused in two places only. None: AdamW."""
    if tensor.dim() == 1 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
        return None
    slabs = tensor.unbind(0) if tensor.dim() == 3 else [tensor]
    if "gate_up" in name:
        return [half for slab in slabs for half in slab.chunk(2)]
    if "kv_a_proj" in name:
        return [part for slab in slabs for part in slab.split([m.kv_lora_rank, m.qk_rope_head_dim])]
    return slabs


class Theirs:
    """The model of `transformers` in FP32, on the whole batch at once."""

    def __init__(self, config, weights, pinned=False):
        self.config = config
        hf = DeepseekV3Config(**to_hf_config(config.model, "fp32"), attn_implementation="eager")
        self.model = DeepseekV3ForCausalLM(hf)
        self.load(weights)
        for name, bias in self.model.named_buffers():
            if pinned and name.endswith("e_score_correction_bias"):
                bias.copy_(always_the_same(config.model))

    def load(self, weights):
        left = self.model.load_state_dict(weights, strict=False)
        assert not left.unexpected_keys and all("correction_bias" in name for name in left.missing_keys)

    def gradients(self, step):
        rows = rows_of(self.config, step)
        self.model.zero_grad()
        F.cross_entropy(self.model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in self.model.named_parameters()}


class Torch:
    """torch's optimizers over FP32 tensors, in place; each matrix is a parameter of its own."""

    def __init__(self, config, weights):
        o, self.clip, self.weights = config.optim, config.optim.clip, weights
        self.grads, self.first, self.second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(3))
        adam, muon = {True: [], False: []}, []
        self.leaves = []  # (leaf, first moment, second moment)
        self.by_muon = set()
        for n, w in weights.items():
            parts = matrices(n, w, config.model) if o.algorithm == "muon" else None
            held = [t[n] for t in (weights, self.grads, self.first, self.second)]
            for part, grad, *moments in zip(*(matrices(n, t, config.model) for t in held)) if parts else [held]:
                leaf = nn.Parameter(part)
                leaf.grad = grad
                (muon if parts else adam[w.dim() > 1]).append(leaf)
                self.leaves.append((leaf, *moments))
            self.by_muon |= {n} if parts else set()
        groups = [{"params": leaves, "weight_decay": o.weight_decay * decays} for decays, leaves in adam.items()]
        self.optimizers = [torch.optim.AdamW(groups, lr=LR, betas=(o.beta1, o.beta2), eps=o.eps)]
        if muon:
            options = dict(momentum=o.muon_momentum, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(torch.optim.Muon(muon, lr=LR, weight_decay=o.weight_decay, **options))

    def step(self, grads):
        """-> the norm before clipping."""
        for n, grad in self.grads.items():
            grad.copy_(grads[n])
        norm = nn.utils.clip_grad_norm_([leaf for leaf, *_ in self.leaves], self.clip).item()
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def moments(self):
        for leaf, first, second in self.leaves:
            state = next(o.state[leaf] for o in self.optimizers if leaf in o.state)
            first.copy_(state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"])
            second.copy_(state.get("exp_avg_sq", second))
        return self.first, self.second


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("engine, algorithm", [("whole", "adamw"), ("whole", "muon"), ("deepspeed", "adamw")])
def test_eight_ranks_equal_one_process_of_torch(engine, algorithm):
    words = [*LAYOUT, f"optim.engine={engine}", f"optim.algorithm={algorithm}"]
    config = load([*CONFIG, *words])
    ranks = fork_ranks(8, ours, words, timeout_s=100)
    before, after = (renamed(config, whole(r[i] for r in ranks), "master") for i in (0, 1))
    state = whole(r[1] for r in ranks)
    theirs = Theirs(config, before)
    oracle = Torch(config, {n: p.detach() for n, p in theirs.model.named_parameters()})
    for number, norm in enumerate(ranks[0][2]):
        grads, found = theirs.gradients(number), renamed(config, state, f"grad{number}")
        assert found.keys() == grads.keys()
        # Muon's weights are as close as its rounding lets them be, and so are the gradients that follow, and their norm.
        close = 1e-5 if algorithm == "adamw" or number == 0 else 1e-3
        for n in grads:
            assert relative(found[n], grads[n]) <= close, n
        assert norm == pytest.approx(oracle.step(grads), rel=close) and norm > config.optim.clip, "this test wants clipping to matter"
    tolerance = 1e-5 if algorithm == "adamw" else 1e-3
    for n, weight in oracle.weights.items():
        assert relative(after[n], weight) <= tolerance, n
        assert relative(after[n], before[n]) > 1e-3, f"{n} was not trained"
    for n, mine, their in beside(oracle, config, state):
        assert relative(mine, their) <= tolerance, n


def beside(oracle, config, state):
    """(name, our moment, theirs), of all moments: those under Muon have no second."""
    for kind, theirs in zip(("exp_avg", "exp_avg_sq"), oracle.moments()):
        found = renamed(config, state, kind)
        assert found.keys() == theirs.keys() - (oracle.by_muon if kind == "exp_avg_sq" else set())
        yield from ((n, mine, theirs[n]) for n, mine in found.items())


# Of the norm. A rounding to BF16's 8 bits moves a value by up to 2^-8 of it, evenly: by 2^-8 / sqrt(3) in the mean square. A moment has
# been rounded once a step; independent roundings add up to sqrt(STEPS / 3) 2^-8 at most. Half of that more, since some tensors are small.
BF16_MOMENTS = 1.5 * (STEPS / 3) ** 0.5 * 2**-8
# Newton-Schulz multiplies 15 times in BF16: so many roundings, of 2^-8 / sqrt(3) each.
BF16_MUON = 2 * (15 / 3) ** 0.5 * 2**-8


@pytest.mark.parametrize("algorithm, moments", [("adamw", "fp32"), ("adamw", "bf16"), ("muon", "bf16")])
def test_eight_ranks_in_bf16(algorithm, moments):
    """Gradients against the FP32 model of `transformers` with the same rounded weights; the update against torch's over FP32 masters, fed
    with our gradients. Routing is pinned, since BF16 rounding decides near-ties."""
    words = [*LAYOUT, "precision=bf16", f"optim.algorithm={algorithm}", f"optim.moments={moments}"]
    config = load([*CONFIG, *words])
    ranks = fork_ranks(8, ours, words, True, timeout_s=100)
    state = whole(r[1] for r in ranks)
    before, after = renamed(config, whole(r[0] for r in ranks), "master"), renamed(config, state, "master")
    theirs, oracle = Theirs(config, before, pinned=True), Torch(config, {n: master.clone() for n, master in before.items()})
    for number, norm in enumerate(ranks[0][2]):
        theirs.load({n: master.bfloat16() for n, master in oracle.weights.items()})
        exact, found = theirs.gradients(number), renamed(config, state, f"grad{number}")
        assert found.keys() == exact.keys()
        for n in exact:
            assert found[n].dtype == torch.float32
            assert relative(found[n], exact[n]) <= 3e-2, n  # it has passed through tens of roundings, 2^-9 each
        assert norm == pytest.approx(oracle.step(found), rel=1e-6) and norm > config.optim.clip
    for n, master in oracle.weights.items():  # by how far they went: a step's update is as good as the moments that make it
        tolerance = BF16_MUON if n in oracle.by_muon else BF16_MOMENTS if moments == "bf16" else 1e-5
        assert after[n].dtype == torch.float32 and relative(after[n] - before[n], master - before[n]) <= tolerance, n
    for n, mine, their in beside(oracle, config, state):
        rounded = moments == "bf16" and n not in oracle.by_muon
        assert mine.dtype == (torch.bfloat16 if rounded else torch.float32), n
        assert relative(mine, their) <= (BF16_MOMENTS if rounded else 1e-5), n
    for name, (_, offset, weights) in (item for r in ranks for item in r[3].items()):
        master = state[f"{name}.master"][offset : offset + len(weights)]
        assert weights.dtype == torch.bfloat16 and torch.equal(weights, master.bfloat16()), f"{name}: not the masters, rounded"


# ---------------------------------------------------------------- what state weighs


def live_bytes(optim, dtype):
    """({tensor of state: bytes}, the most bytes that a step held beside state, weights and gradients)."""
    param = nn.Parameter(torch.zeros(1 << 20, dtype=dtype))
    optimizer = make_optimizer(optim, [Spec(name="w", param=param, group=dist.group.WORLD, numel=1 << 20)])
    param.main_grad.fill_(1.0)
    optimizer.reduce()
    norm = optimizer.norm(1.0)
    with Peak() as peak:
        optimizer.step(norm, 1e-3)
    state = {name: c.data.numel() * c.data.element_size() for name, c in optimizer.state().items()}
    return state, peak.bytes


class Peak(TorchDispatchMode):
    """The most bytes of new storages that were alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                self.alive[id(t.untyped_storage())] = (weakref.ref(t), t.untyped_storage().nbytes())
        self.alive = {key: (ref, n) for key, (ref, n) in self.alive.items() if ref() is not None}
        self.bytes = max(self.bytes, sum(n for _, n in self.alive.values()))
        return out


def test_bf16_moments_take_half_and_leave_no_copy():
    """Per element: FP32 moments 8 bytes, BF16 ones 4, and no more while they are widened than some blocks of a cache's size."""
    optim, mib = OptimConfig(lr=0.0), 1 << 20
    ((wide, _),) = fork_ranks(1, live_bytes, dataclasses.replace(optim, moments="fp32"), torch.bfloat16)
    ((narrow, peak),) = fork_ranks(1, live_bytes, optim, torch.bfloat16)
    assert wide == {"w.master": 4 * mib, "w.exp_avg": 4 * mib, "w.exp_avg_sq": 4 * mib}
    assert narrow == {"w.master": 4 * mib, "w.exp_avg": 2 * mib, "w.exp_avg_sq": 2 * mib}
    assert 0 < peak <= 1.5 * mib, f"{peak} bytes more while a step is taken"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "words, field, nearest",
    [
        ("precision=bf16 optim.beta2=0.995", "optim.beta2", 0.99),
        ("precision=fp32 optim.moments=bf16 optim.beta2=0.999", "optim.beta2", 0.99),
        ("precision=fp64 optim.moments=bf16", "optim.moments", "auto"),
        ("optim.engine=deepspeed optim.algorithm=muon", "optim.engine", "whole"),
        ("optim.engine=deepspeed optim.moments=bf16", "optim.moments", "fp32"),
        ("optim.engine=deepspeed precision=fp64", "optim.engine", "whole"),
    ],
)
def test_refused(words, field, nearest):
    config = load(words.split())
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert (caught.value.field, caught.value.nearest) == (field, nearest)
    validate(load([*words.split(), f"{field}={nearest}"]))


@pytest.mark.parametrize(
    "words",
    [
        "precision=bf16 optim.beta2=0.99",
        "precision=fp32 optim.beta2=0.999",
        "precision=bf16 optim.beta2=0.999 optim.engine=deepspeed",
        "precision=bf16 optim.beta2=0.999 optim.moments=fp32",
        "precision=fp64 optim.algorithm=muon",
    ],
)
def test_not_refused(words):
    validate(load(words.split()))
