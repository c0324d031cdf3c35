"""Whole training steps on dp 2 x ep 2 x pp 2, weight gradients run late, against `transformers` and torch's AdamW, Muon and
`clip_grad_norm_` in one process; what is refused; what state weighs.
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
from shoestring.train.engine import Engine
from shoestring.train.interop.hf_format import pieces, to_hf_config
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
    monkeypatch.setitem(SCHEDULES, "1f1b", dataclasses.replace(one_f_one_b, actions=late))


def ours(words):
    """A rank's {tensor: (numel, offset, data)} before and after three steps, with each step's gradients before clipping, and the norms."""
    config = load([*CONFIG, *words])
    engine, norms = Engine(config), []
    owned = lambda: {name: (c.numel, c.offset, c.data.clone()) for name, c in engine.optimizer.state().items()}
    before, grads, take_step = owned(), {}, engine.optimizer.step

    def step(norm, lr):
        for p in getattr(engine.optimizer, "_pieces", ()):
            grads[f"{p.spec.name}.grad{engine.optimizer.steps}"] = (p.spec.numel, p.offset, p.grad.clone())
        return take_step(norm, lr)

    engine.optimizer.step = step
    for number in range(STEPS):
        mine = rows_of(config, number)[engine.mesh.dp_rank :: config.parallel.dp]
        batches = [MicroBatch(tokens_BS=r[None, :-1], targets_BN=r[None, 1:]) for r in mine]
        norms.append(engine.train_step(batches, LR).grad_norm)
    return before, owned() | grads, norms


def whole(ranks):
    tensors = {}
    for part in ranks:
        for name, (numel, offset, data) in part.items():
            tensors.setdefault(name, torch.full((numel,), torch.nan))[offset : offset + len(data)] = data
    return tensors


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
    """The same steps with other people's code: the whole batch at once, each matrix a parameter of its own."""

    def __init__(self, config, first):
        self.config, o = config, config.optim
        hf = DeepseekV3Config(**to_hf_config(config.model, "fp32"), attn_implementation="eager")
        self.model = DeepseekV3ForCausalLM(hf)
        assert not self.model.load_state_dict(first, strict=False).unexpected_keys
        self.weights = {n: p.detach() for n, p in self.model.named_parameters()}
        self.grads = {n: torch.zeros_like(p) for n, p in self.weights.items()}
        self.first, self.second = ({n: torch.zeros_like(p) for n, p in self.weights.items()} for _ in range(2))
        adam, muon = {True: [], False: []}, []
        self.leaves = []  # (leaf, first moment, second moment)
        for n, p in self.weights.items():
            parts = matrices(n, p, config.model) if o.algorithm == "muon" else None
            held = [t[n] for t in (self.weights, self.grads, self.first, self.second)]
            for part, grad, *moments in zip(*(matrices(n, t, config.model) for t in held)) if parts else [held]:
                leaf = nn.Parameter(part)
                leaf.grad = grad
                (muon if parts else adam[p.dim() > 1]).append(leaf)
                self.leaves.append((leaf, *moments))
        groups = [{"params": leaves, "weight_decay": o.weight_decay * decays} for decays, leaves in adam.items()]
        self.optimizers = [torch.optim.AdamW(groups, lr=LR, betas=(o.beta1, o.beta2), eps=o.eps)]
        if muon:
            options = dict(momentum=o.muon_momentum, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(torch.optim.Muon(muon, lr=LR, weight_decay=o.weight_decay, **options))

    def step(self, number):
        """-> norm, {parameter: gradient before clipping}."""
        rows = rows_of(self.config, number)
        self.model.zero_grad()
        F.cross_entropy(self.model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        unclipped = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip).item()
        for n, p in self.model.named_parameters():
            self.grads[n].copy_(p.grad)
        for optimizer in self.optimizers:
            optimizer.step()
        return norm, unclipped

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
    before, after, norms = whole(r[0] for r in ranks), whole(r[1] for r in ranks), ranks[0][2]
    named = defaultdict(list)
    for p in pieces(config.model, stacked=True):
        if not p.is_selection_bias:
            named[p.name].append(p)

    def mine(tensors, name, kind):
        """Our tensor of that kind, as theirs is called and shaped; experts are stacked."""
        parts = [tensors[f"{p.weight}.{kind}"][p.offset : p.offset + p.numel].view(p.shape) for p in named[name]]
        return parts[0] if len(parts) == 1 else torch.stack(parts)

    theirs = Theirs(config, {n: mine(before, n, "master") for n in named})
    for number, norm in enumerate(norms):
        their_norm, grads = theirs.step(number)
        assert norm == pytest.approx(their_norm, rel=1e-5) and norm > config.optim.clip, "this test wants clipping to matter"
        for n in named if engine == "whole" else ():
            # Muon's weights are as close as its rounding lets them be, and so are the gradients that follow.
            assert relative(mine(after, n, f"grad{number}"), grads[n]) <= (1e-5 if algorithm == "adamw" or number == 0 else 1e-3), n
    first, second = theirs.moments()
    tolerance = 1e-5 if algorithm == "adamw" else 1e-3
    for n, (p, *_) in named.items():
        assert relative(mine(after, n, "master"), theirs.weights[n]) <= tolerance, n
        assert relative(mine(after, n, "master"), mine(before, n, "master")) > 1e-3, f"{n} was not trained"
        assert relative(mine(after, n, "exp_avg"), first[n]) <= tolerance, n
        if f"{p.weight}.exp_avg_sq" in after:
            assert relative(mine(after, n, "exp_avg_sq"), second[n]) <= tolerance, n
        else:
            assert algorithm == "muon" and matrices(n, second[n], config.model), n


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
