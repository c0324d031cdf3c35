"""The plain model and the engine in one process say the same to 1e-12, setting by setting; `transformers` has the plain model's logits.

Neither side knows the other: a mistake in one of them is seen here, whichever it is.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ModelConfig, OptimConfig
from shoestring.kernels.router import Routes, select
from shoestring.launch.local import fork_ranks
from shoestring.launch.verify import plain
from shoestring.launch.verify.plain_optimizer import learning_rate, orthogonal
from shoestring.parallel.phases import MicroBatch
from shoestring.train import engine, trainer
from shoestring.train.interop.hf_format import pieces, to_hf_config, weight_shapes
from shoestring.train.metrics import read_records
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

# Sizes differ from each other, so that no transposition goes unseen. Both router losses weigh something, clipping always acts, one rate
# differs from the next, and an epsilon in the norms' range shows where the latents have their own.
BASE = [
    "data=synthetic", "data.sources.synthetic.num_documents=60", "data.seq_len=12", "precision=fp64", "model.vocab_size=300",
    "model.max_seq_len=64", "model.dim=32", "model.num_layers=3", "model.num_heads=2", "model.q_lora_rank=20", "model.kv_lora_rank=12",
    "model.qk_nope_head_dim=10", "model.qk_rope_head_dim=8", "model.v_head_dim=14", "model.dense_hidden_dim=44", "model.num_experts=8",
    "model.top_k=3", "model.expert_hidden_dim=18", "model.num_groups=4", "model.num_limited_groups=2", "model.init_std=0.2",
    "model.norm_eps=1e-3", "model.rope_theta=500", "train.global_batch_tokens=48", "train.steps=3", "train.eval_sequences=2",
    "optim.warmup_steps=1", "optim.lr=1e-2", "optim.final_lr=1e-3", "optim.clip=0.5", "optim.weight_decay=0.3", "optim.eps=1e-6",
    "optim.bias_update_speed=0.05", "optim.sequence_balance_coef=0.03", "optim.z_loss_coef=0.02",
]  # fmt: skip
YARN = ["model.yarn.factor=4", "model.yarn.original_max_seq_len=8", "model.yarn.beta_slow=0.1"]
CASES = {
    "DeepSeek-V3 in small": [],
    "queries without a latent, one micro-batch": ["model.q_lora_rank=0", "train.micro_batch_sequences=4"],
    "YaRN": [*YARN, "model.yarn.beta_fast=0.5", "model.yarn.mscale=0.7", "model.yarn.mscale_all_dim=1.0"],
    "YaRN without mscales, its ramp cut off, linear decay": [
        *YARN, "model.yarn.mscale=0", "model.yarn.mscale_all_dim=0", "optim.decay=linear", "optim.warmup_steps=0", "optim.decay_steps=3",
    ],
    "softmax scores": ["model.score_func=softmax", "model.num_limited_groups=4", "model.norm_topk=false", "optim.bias_update_speed=0"],
    "one group, weights as they are, two shared": [
        "model.num_groups=1", "model.num_limited_groups=1", "model.norm_topk=false", "model.route_scale=1.5", "model.num_shared_experts=2",
    ],
    "no shared experts, no dense block": ["model.num_shared_experts=0", "model.num_dense_layers=0"],
    "dense blocks only": ["model.num_dense_layers=3", "model.mtp_depth=1"],
    "tied, two prediction modules, average": ["model.tie_embeddings=true", "model.mtp_depth=2", "optim.ema_decay=0.7"],
    "prediction module, clip that does not act": ["model.mtp_depth=1", "optim.mtp_weight=0.7", "optim.clip=1e6", "optim.decay=none"],
    "three modules, decay that ends early": ["model.mtp_depth=3", "model.num_layers=2", "optim.warmup_steps=0", "optim.decay_steps=1"],
    "Muon": ["optim.algorithm=muon", "optim.ema_decay=0.5", "model.mtp_depth=1"],
    "Muon, queries without a latent": ["optim.algorithm=muon", "model.q_lora_rank=0", "optim.muon_momentum=0.6", "optim.constant_steps=1"],
    "routing from outside": ["model.mtp_depth=1", "train.micro_batch_sequences=2"],
}  # fmt: skip


def outside(step, layer, samples, select, score_TE):
    """Every second sample as its router wants it, the others by number: so that all arguments matter."""
    expert_TK = select(score_TE).view(len(samples), -1, 3).clone()
    for row, sample in enumerate(samples):
        if sample % 2:
            expert_TK[row] = (torch.arange(3) + sample + layer + step) % score_TE.shape[1]
    return expert_TK.view(-1, 3)


@dataclass
class Recorder(engine.Watch):
    """What an engine of one process says and sees."""

    choose: object
    first: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    def begun(self, engine):
        g = torch.Generator().manual_seed(0)
        for name, chunk in engine.chunks(saving=True).items():  # norms begin at 1 and biases at 0: mistakes in them would not show
            if name.endswith(("norm.master", ".bias")):
                chunk.data.add_(torch.randn(chunk.data.shape, generator=g, dtype=torch.float64), alpha=0.2)
            if name.endswith((".master", ".bias")):
                self.first[name] = chunk.data.clone()
        run = engine.executor.step

        def step(batches: list[MicroBatch], **how):
            self.rows.append(torch.cat([torch.cat([b.tokens_BS[:, :1], b.targets_BN], 1) for b in batches]))
            return run(batches, **how)

        engine.executor.step = step

    def routing(self, step, samples):
        return (lambda layer, select, score_TE: self.choose(step, layer, samples, select, score_TE)) if self.choose else None

    def reduced(self, engine, norm):
        self.grads = {f"{name}.grad": chunk.data.clone() for name, chunk in engine.optimizer.gradients().items()}

    def stepped(self, engine, r):
        tensors = self.grads | {name: chunk.data.clone() for name, chunk in engine.chunks(saving=True).items() if chunk.numel}
        names = ("loss", "grad_norm", "clip_coef", "balance_loss", "z_loss", "router_entropy", "bias_norm")
        mtp = {f"mtp_loss.{k}": loss for k, loss in enumerate(r.mtp_losses)}
        self.steps.append(({name: getattr(r, name) for name in names} | mtp, r.loads, tensors))


def session(words, choose):
    config, watch = load(words), Recorder(choose)
    trainer.run(config, torch.device("cpu"), log=lambda line: None, watch=watch)
    rates = [record.lr for record in read_records(f"{config.run_dir}/metrics.jsonl")]
    return watch.first, watch.rows, watch.steps, rates


def test_of_equals_the_first_as_the_router_takes_them():
    m = load([*BASE, "model.num_experts=32", "model.num_groups=8", "model.num_limited_groups=3", "model.top_k=6"]).model
    score_TE = torch.randint(0, 4, (500, 32), generator=torch.Generator().manual_seed(0)) / 4
    routes = Routes(top_k=6, num_groups=8, num_limited_groups=3)
    assert torch.equal(plain._choice(m, score_TE)[0], select(score_TE, torch.zeros(32), routes))


@pytest.mark.parametrize("name", CASES)
def test_the_engine_in_one_process(name, tmp_path, tmp_path_factory):
    choose = outside if name == "routing from outside" else None
    cache = tmp_path_factory.getbasetemp() / "cache"
    words = [*BASE, *CASES[name], f"data.cache_dir={cache}", f"run_dir={tmp_path}"]
    ((first, rows, steps, rates),) = fork_ranks(1, session, words, choose)
    config = load(words)
    before = {key: t.clone() for key, t in first.items()}
    evidence = plain.train(config, first, rows, choose)
    assert len(evidence.steps) == len(steps) == 3 and all(torch.equal(before[key], t) for key, t in first.items())
    for step, (numbers, loads, tensors), lr in zip(evidence.steps, steps, rates):
        assert step.numbers == pytest.approx(numbers | {"lr": lr}, rel=1e-12)
        assert (step.numbers["clip_coef"] < 1) == (config.optim.clip < 1e6)
        assert torch.equal(step.loads_LE, loads) and step.loads_LE.dtype == torch.int64
        assert step.tensors.keys() == tensors.keys()
        for key, wanted in tensors.items():
            assert step.tensors[key].shape == wanted.shape
            assert (step.tensors[key] - wanted).norm() <= 1e-11 * wanted.norm(), key
        for layer, choice in step.choices.items():
            load_E = step.loads_LE[layer - config.model.num_dense_layers]
            assert torch.equal(choice.flatten().bincount(minlength=8), load_E) and choice.shape == (4, 12, 3)
            assert (choice.diff(dim=-1) > 0).all() and step.margins[layer].shape == (4, 12)


# ---------------------------------------------------------------- transformers


def flat_weights(m: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """As `first`: matrices with `init_std`, norms around 1, biases around 0."""
    g, flat = torch.Generator().manual_seed(seed), {}
    for name, shape in weight_shapes(m).items():
        drawn = torch.randn(math.prod(shape), generator=g, dtype=torch.float64)
        key = name if name.endswith(".bias") else f"{name}.master"
        flat[key] = 1 + 0.2 * drawn if name.endswith("norm") else 0.2 * drawn
    return flat


def lifted(model, monkeypatch):
    """Norms, gate, softmax and rotary angles of `transformers` in FP64, where it says FP32 whatever the model's dtype."""
    wide = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("_")})
    wide.float32 = torch.float64
    monkeypatch.setattr(theirs, "torch", wide)
    rotary = model.model.rotary_emb

    def turns(x, position_ids):
        angles = position_ids[..., None].double() * torch.cat([rotary.inv_freq, rotary.inv_freq]).double()
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    monkeypatch.setattr(rotary, "forward", turns)
    return model


@pytest.mark.parametrize("name", [name for name, words in CASES.items() if "model.mtp_depth" not in str(words)])
def test_logits_equal_transformers(name, monkeypatch):
    m = load([*BASE, *CASES[name]]).model
    flat = flat_weights(m)
    config = AutoConfig.for_model(**to_hf_config(m, "fp64"))
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").double()
    state: dict[str, list] = {}
    for p in pieces(m, stacked=True):
        if p.implied:
            flat[p.weight].zero_()
            continue
        source = flat.get(p.weight if p.is_selection_bias else f"{p.weight}.master", torch.zeros(0))  # of no shared experts
        state.setdefault(p.name, []).append(source[p.offset : p.offset + p.numel].view(p.shape))
    state = {key: torch.stack(parts) if parts[0].dim() and ".mlp.experts." in key else parts[0] for key, parts in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
    is_v3 = m.score_func == "sigmoid"  # DeepseekV2ForCausalLM stays as it comes, with norms, gate and angles in FP32
    wanted = (lifted(model, monkeypatch) if is_v3 else model)(tokens, use_cache=False).logits
    found = plain.logits(m, flat, tokens)
    assert found.dtype == wanted.dtype == torch.float64
    assert (found - wanted).norm() <= (1e-11 if is_v3 else 1e-6) * wanted.norm()


# ---------------------------------------------------------------- parts


@given(st.integers(0, 10**6), st.sampled_from([(8, 4, 2, 3), (8, 1, 1, 2), (6, 3, 3, 4), (6, 3, 1, 2), (12, 4, 3, 9)]))
def test_a_margin_is_a_promise(seed, sizes):
    """While scores move by less than half the margin, the choice stays; without groups, a move of one score by all of it decides."""
    num_experts, groups, limit, top_k = sizes
    m = ModelConfig(num_experts=num_experts, num_groups=groups, num_limited_groups=limit, top_k=top_k)
    g = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(16, num_experts, generator=g, dtype=torch.float64)
    expert_TK, margin_T = plain._choice(m, score_TE)
    moved = margin_T.clamp(max=10)[:, None] * 0.4999 * torch.randn(16, num_experts, generator=g).sign()
    assert torch.equal(plain._choice(m, score_TE + moved)[0].sort(1).values, expert_TK.sort(1).values)
    if limit == groups:  # exactly that much: the last one chosen and the first one left out trade places
        ranked = score_TE.argsort(1, descending=True)
        far = score_TE.clone().scatter_add_(1, ranked[:, top_k, None], margin_T[:, None] * 1.0001)
        assert (plain._choice(m, far)[0].sort(1).values != expert_TK.sort(1).values).any(1).all()


@given(st.sampled_from(["cosine", "linear", "none"]), st.integers(0, 4), st.integers(0, 4), st.integers(0, 5), st.integers(1, 14))
def test_learning_rate(decay, warmup, constant, decay_steps, num_steps):
    o = OptimConfig(lr=0.3, final_lr=0.02, warmup_steps=warmup, constant_steps=constant, decay=decay, decay_steps=decay_steps)
    for step in range(num_steps + 2):
        assert learning_rate(o, step, num_steps) == pytest.approx(engine.learning_rate(o, step, num_steps), rel=1e-14)


def test_orthogonal():
    """What is no zero in a spectrum ends near 1, tall or wide; zero stays."""
    x = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(orthogonal(x))
    assert 0.6 < s.min() < s.max() < 1.3
    assert (orthogonal(x).mT - orthogonal(x.mT)).abs().max() < 1e-13
    assert not orthogonal(torch.zeros(2, 3)).any()
