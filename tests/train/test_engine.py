"""Whole optimizer steps of one process against `transformers`, torch's AdamW and `clip_grad_norm_`; the learning-rate shape."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine, learning_rate
from shoestring.train.interop.hf_format import pieces, to_hf_config
from shoestring.train.rank_share import stage_layers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

STEPS, LR = 3, 1e-3
CONFIG = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=48", "model.num_layers=3", "model.dense_hidden_dim=64",
    "model.expert_hidden_dim=24", "model.init_std=0.1", "train.global_batch_tokens=256", "train.micro_batch_sequences=2",
    "optim.sequence_balance_coef=0", "optim.clip=0.5", "optim.bias_update_speed=0.01", "optim.weight_decay=0.5", "optim.eps=1e-6",
]  # fmt: skip


def rows_of(config, step):
    g = torch.Generator().manual_seed(step)
    return torch.randint(config.model.vocab_size, (config.sequences_per_step, config.data.seq_len + 1), generator=g)


def ours():
    config = load(CONFIG)
    engine, records = Engine(config), []
    first = in_their_names(engine)
    for step in range(STEPS):
        parts = rows_of(config, step).split(config.train.micro_batch_sequences)
        result = engine.train_step([MicroBatch(tokens_BS=r[:, :-1], targets_BN=r[:, 1:]) for r in parts], LR)
        records.append((result.loss, result.grad_norm, result.clip_coef, result.loads))
    return first, in_their_names(engine), records


def in_their_names(engine):
    m, named = engine.config.model, {}
    for p in pieces(m, stacked=True):
        source = engine.biases[int(p.name.split(".")[2]) - m.num_dense_layers] if p.is_selection_bias else engine.parameters()[p.weight]
        named.setdefault(p.name, []).append(source.detach().flatten()[p.offset : p.offset + p.numel].view(p.shape).clone())
    return {name: torch.stack(parts) if ".mlp.experts." in name else parts[0] for name, parts in named.items()}


def theirs(first):
    """The same by other people's code: mean loss of the whole batch at once, decay of matrices only, biases moved by hand."""
    config = load(CONFIG)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(config.model, "fp32"), attn_implementation="eager"))
    model.load_state_dict(first, strict=True)
    matrices, vectors = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    o = config.optim
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(o.beta1, o.beta2), eps=o.eps)
    routers, chosen, records = [layer.mlp.gate for layer in model.model.layers[config.model.num_dense_layers :]], [], []
    for router in routers:
        router.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    for step in range(STEPS):
        rows = rows_of(config, step)
        chosen.clear()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip).item()
        optimizer.step()
        loads = torch.stack([torch.bincount(c.flatten(), minlength=config.model.num_experts) for c in chosen])
        for router, load_E in zip(routers, loads):
            router.e_score_correction_bias += o.bias_update_speed * torch.sign(load_E.float().mean() - load_E)
        records.append((loss.item(), norm, min(1.0, o.clip / norm), loads))
    return model.state_dict(), records


def test_three_steps_equal_transformers_and_torch():
    ((first, last, records),) = fork_ranks(1, ours)
    ((their_last, their_records),) = fork_ranks(1, theirs, first)
    for (loss, norm, clip, loads), (their_loss, their_norm, their_clip, their_loads) in zip(records, their_records):
        assert loss == pytest.approx(their_loss, rel=1e-6) and norm == pytest.approx(their_norm, rel=1e-5)
        assert clip == pytest.approx(their_clip, rel=1e-5) and clip < 0.9, "this test wants clipping to matter"
        assert torch.equal(loads, their_loads)
    assert last.keys() <= their_last.keys()
    for name, weight in last.items():
        assert (weight - their_last[name]).abs().max() <= 1e-2 * LR * STEPS, name
        assert not torch.equal(weight, first[name]), f"{name} was not trained"


def test_learning_rate():
    """Linear warm-up to the peak, constant, a half cosine that ends on the final rate at the last step."""
    o = load(["optim.lr=1e-2", "optim.final_lr=1e-3", "optim.warmup_steps=4", "optim.constant_steps=6", "train.steps=30"]).optim
    rates = [learning_rate(o, step, 30) for step in range(30)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2]) and rates[4:10] == [1e-2] * 6
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[9:])) and rates[-1] == pytest.approx(1e-3)
    assert rates[10 + 10] == pytest.approx(1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * 10 / 19)))
    longer = load(["optim.lr=1e-2", "optim.warmup_steps=4", "optim.decay_steps=10", "train.steps=30"]).optim
    assert learning_rate(longer, 13, 30) > longer.final_lr == learning_rate(longer, 14, 30) == learning_rate(longer, 29, 30)


def test_stages_are_even_in_cost():
    """The head is dear in a small model: the last stage gets fewer blocks."""
    layers = stage_layers(load(["model.num_layers=8", "model.vocab_size=60000", "parallel.pp=2"]))
    assert [i for stage in layers for i in stage] == list(range(8)) and len(layers[1]) < len(layers[0])
