"""Multi-token prediction against a plain model: `transformers`' decoder layers, put together by hand; and its copies on several stages."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import IGNORED, MicroBatch
from shoestring.train.engine import Engine
from shoestring.train.interop.hf_format import pieces, to_hf_config
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3Model

SEQ_LEN = 12
BASE = [
    "data=synthetic", f"data.seq_len={SEQ_LEN}", "model.vocab_size=300", "model.dim=48", "model.num_layers=2", "model.dense_hidden_dim=64",
    "model.expert_hidden_dim=24", "model.init_std=0.2", "train.global_batch_tokens=96", "train.micro_batch_sequences=2",
    "optim.sequence_balance_coef=0", "precision=fp64", "optim.mtp_weight=0.7",
]  # fmt: skip


def rows(config, reach):
    """(sequences, S + reach): reach - 1 tokens beyond the next one are known."""
    return torch.randint(300, (config.sequences_per_step, SEQ_LEN + reach), generator=torch.Generator().manual_seed(1))


def ours(words, reach):
    """(losses by depth, weights in released names, gradients likewise) of a first step."""
    engine = Engine(load([*BASE, *words]))
    c, weights, before, grads = engine.config, engine.parameters(), {}, {}
    # The norms start at one: an exchange of two of them would not show.
    for name, weight in weights.items():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    parts = [MicroBatch(tokens_BS=r[:, :SEQ_LEN], targets_BN=r[:, 1:]) for r in rows(c, reach).split(2)]
    losses = engine.executor.step(parts) * engine.nominal_tokens / c.train.global_batch_tokens
    for p in pieces(c.model, stacked=True):
        if not p.is_selection_bias:
            for found, source in ((before, weights[p.weight].detach()), (grads, weights[p.weight].main_grad)):
                part = source.flatten()[p.offset : p.offset + p.numel].view(p.shape).clone()
                found.setdefault(p.name, []).append(part)
    scale = engine.nominal_tokens / c.train.global_batch_tokens
    whole = lambda found: {n: torch.stack(parts) if ".mlp.experts." in n else parts[0] for n, parts in found.items()}
    return losses.tolist(), whole(before), {name: grad * scale for name, grad in whole(grads).items()}


class Plain(nn.Module):
    """What DeepSeek-V3 §2.2 says, in the names of the released checkpoint; all modules use the main model's embedding and head."""

    def __init__(self, m):
        super().__init__()
        config = to_hf_config(m, "fp64") | {"num_hidden_layers": m.num_layers + m.mtp_depth}
        config["first_k_dense_replace"] = m.num_dense_layers if m.num_moe_layers else m.num_blocks
        self.m, self.model = m, DeepseekV3Model(DeepseekV3Config(**config, attn_implementation="eager", experts_implementation="eager"))
        self.lm_head = self.model.embed_tokens if m.tie_embeddings else nn.Linear(m.dim, m.vocab_size, bias=False)
        for layer in self.model.layers[m.num_layers :]:
            layer.enorm, layer.hnorm = nn.RMSNorm(m.dim, m.norm_eps), nn.RMSNorm(m.dim, m.norm_eps)
            layer.eh_proj = nn.Linear(2 * m.dim, m.dim, bias=False)
            layer.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(m.dim, m.norm_eps)})

    def forward(self, rows_BN):
        """Losses by depth: means over all inputs, of which those whose target is not known count nothing."""
        ahead = lambda k: F.pad(rows_BN[:, k : k + SEQ_LEN], (0, max(0, k + SEQ_LEN - rows_BN.shape[1])), value=IGNORED)
        x = self.model.embed_tokens(ahead(0))
        positions = torch.arange(SEQ_LEN)[None]
        turns, mask = self.model.rotary_emb(x, positions), torch.full((SEQ_LEN, SEQ_LEN), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        block = lambda layer, x: layer(x, attention_mask=mask, position_ids=positions, position_embeddings=turns)
        for layer in self.model.layers[: self.m.num_layers]:
            x = block(layer, x)
        seen = self.model.norm(x)
        losses = [self.loss(seen, ahead(1))]
        for k, layer in enumerate(self.model.layers[self.m.num_layers :], 1):
            known = self.model.embed_tokens(ahead(k).clamp(min=0))
            x = block(layer, layer.eh_proj(torch.cat([layer.enorm(known), layer.hnorm(seen)], -1)))
            seen = layer.shared_head["norm"](x)
            losses.append(self.loss(seen, ahead(k + 1)))
        return losses

    def loss(self, seen, targets):
        summed = F.cross_entropy(
            F.linear(seen, self.lm_head.weight).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return summed / targets.numel()


def theirs(words, reach, weights):
    config = load([*BASE, *words])
    model = Plain(config.model).double()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    copies = [n for n in unexpected if n.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]
    assert sorted(unexpected) == sorted(copies) and all("e_score_correction_bias" in n or n == "lm_head.weight" for n in missing)
    losses, depth = model(rows(config, reach)), config.model.mtp_depth
    (losses[0] + config.optim.mtp_weight / depth * sum(losses[1:])).backward()
    return [loss.item() for loss in losses], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "words, reach",
    [
        (["model.mtp_depth=1"], 2),
        (["model.mtp_depth=2"], 3),
        (["model.mtp_depth=2"], 1),  # nothing is known beyond the next token: the last targets do not count
        (["model.mtp_depth=1", "model.tie_embeddings=true"], 2),
        (["model.mtp_depth=1", "model.num_dense_layers=2"], 2),  # a dense model's module is dense
    ],
    ids=["depth 1", "depth 2", "targets that are not there", "tied", "dense"],
)
def test_loss_and_gradients_equal_a_plain_model(words, reach):
    ((losses, weights, grads),) = fork_ranks(1, ours, words, reach)
    ((their_losses, their_grads),) = fork_ranks(1, theirs, words, reach, weights)
    # FP64, but for norms, turns and the gate's weights, which `transformers` computes in FP32.
    assert losses == pytest.approx(their_losses, rel=1e-7) and len(set(losses)) == len(losses)
    assert all(f"model.layers.2.{name}.weight" in their_grads for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
    for name, wanted in their_grads.items():
        if wanted is not None:
            assert (grads[name] - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-9), name


def embeddings(words):
    engine = Engine(load([*BASE, *words]))
    c = engine.config
    for step in range(3):
        r = torch.randint(300, (c.sequences_per_step, SEQ_LEN + 2), generator=torch.Generator().manual_seed(step))
        mine = [r[(i * c.parallel.dp + engine.mesh.dp_rank) * 2 :][:2] for i in range(c.num_micro_batches)]
        engine.train_step([MicroBatch(tokens_BS=part[:, :SEQ_LEN], targets_BN=part[:, 1:]) for part in mine], 1e-2)
    held = engine.parameters()
    return dist.get_rank(), {name: held[name].detach().clone() for name in ("embed", "head") if name in held}


@pytest.mark.parametrize(
    "layout, tied",
    [("pp=2 ep=2", False), ("pp=2 edp=2", True), ("pp=2 chunks=2 schedule=interleaved_1f1b", False)],
    ids=["two stages", "tied", "two stages each"],
)
def test_copies_stay_equal(layout, tied):
    """Embedding and head are one each, wherever they are: bit for bit, after steps in which both ends moved them."""
    words = ["model.mtp_depth=1", "model.num_layers=4", f"model.tie_embeddings={tied}", *(f"parallel.{word}" for word in layout.split())]
    world = load([*BASE, *words]).parallel.world_size
    ranks = fork_ranks(world, embeddings, words)
    holders = {name: [held[name] for _, held in ranks if name in held] for name in ("embed", "head")}
    assert len(holders["embed"]) == world, "every stage here is the first or the last"
    assert len(holders["head"]) == (0 if tied else world // 2)
    for copies in holders.values():
        assert all(torch.equal(copies[0], other) for other in copies)
    ((_, alone),) = fork_ranks(1, embeddings, words[:3])
    assert (ranks[0][1]["embed"] - alone["embed"]).abs().max() < 1e-9
