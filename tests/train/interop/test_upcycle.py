"""Upcycling: where the first logits are the dense model's, and how near they are elsewhere."""

import dataclasses

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.schema import ModelConfig
from shoestring.train.checkpoint.checkpointer import Archive
from shoestring.train.interop.hf import HFError, ModelWeights, export, import_, load_pretrained, write
from shoestring.train.interop.hf_checkpoint import CheckpointWeights
from shoestring.train.interop.upcycle import upcycle
from shoestring.train.model.decoder import CausalLM, materialise

DENSE = ModelConfig(
    name="imported", num_layers=3, dim=32, vocab_size=67, max_seq_len=64, num_heads=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, num_dense_layers=3, dense_hidden_dim=288, num_experts=8,
    num_shared_experts=1, top_k=1, expert_hidden_dim=20, init_std=0.15,
)  # fmt: skip
COPIES = dict(num_dense_layers=1, expert_hidden_dim=288, num_experts=6, top_k=4, num_shared_experts=0)
SLICES = dict(num_dense_layers=0, expert_hidden_dim=144, num_experts=8, top_k=4, num_shared_experts=0)
THIRDS = dict(num_dense_layers=0, expert_hidden_dim=96, num_experts=12, top_k=3, num_shared_experts=0)

# Each is the dense model's function, for the reason in its name.
EQUAL = {
    "copies, unscaled": COPIES,
    "copies, one shared, route scale": COPIES | dict(num_shared_experts=1, route_scale=2.5),
    "copies, two shared, groups, softmax": COPIES | dict(num_shared_experts=2, num_groups=3, num_limited_groups=3, score_func="softmax"),
    "halves, chosen whole": SLICES,
    "halves, one shared": SLICES | dict(num_shared_experts=1),
    "halves, three shared, groups": SLICES | dict(num_shared_experts=3, num_groups=2, num_limited_groups=1, route_scale=2.5),
    "thirds": THIRDS,
    "thirds, two shared": THIRDS | dict(num_shared_experts=2, top_k=6),
}
# Right on average only.
NEAR = {
    "three of halves": SLICES | dict(top_k=3),
    "halves, not normalised": SLICES | dict(norm_topk=False),
    "copies, not normalised softmax": COPIES | dict(norm_topk=False, score_func="softmax"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(model, its folder)."""
    with torch.device("meta"):
        model = CausalLM(DENSE)
    materialise(model.stage, seed=0)
    folder = tmp_path_factory.mktemp("dense") / "hf"
    write(ModelWeights(model), DENSE, folder, dtype="fp32")
    return model, folder


def upcycled(folder, out, **changes) -> CausalLM:
    """The model that training would start with."""
    m = dataclasses.replace(DENSE, name="moe", **changes)
    held = CheckpointWeights(upcycle(folder, out, m))
    with torch.device("meta"):
        model = CausalLM(m)
    model.to_empty(device="cpu")
    for name, tensor in [*model.stage.named_parameters(), *model.stage.named_buffers()]:
        tensor.data.copy_(held.read(name, 0, tensor.numel()).view_as(tensor))
    return model


def distance(a: CausalLM, b: CausalLM) -> float:
    tokens = torch.randint(DENSE.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    wanted = b(tokens)
    return ((a(tokens) - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("changes", EQUAL.values(), ids=EQUAL.keys())
def test_the_first_logits_are_the_dense_models(dense, tmp_path, changes):
    assert distance(upcycled(dense[1], tmp_path / "out", **changes), dense[0]) <= 2e-6


@pytest.mark.parametrize("changes", NEAR.values(), ids=NEAR.keys())
def test_elsewhere_they_are_near(dense, tmp_path, changes):
    """Nearer than without any MLP output, and not equal."""
    model, folder = dense
    without = upcycled(folder, tmp_path / "without", **changes)
    for name, param in without.stage.named_parameters():
        if name.endswith(".down"):
            param.data.zero_()
    found = distance(upcycled(folder, tmp_path / "out", **changes), model)
    assert 1e-4 < found < 0.75 * distance(without, model)


def test_experts_are_told_apart(dense, tmp_path):
    """Each copy has a router row of its own, drawn by the seed; the slices of a copy share theirs."""
    rows = upcycled(dense[1], tmp_path / "a", **SLICES).stage.layers["1"].router.weight
    assert torch.equal(rows[0::2], rows[1::2]) and len(rows.unique(dim=0)) == 4
    m = dataclasses.replace(DENSE, name="moe", **SLICES)
    other = CheckpointWeights(upcycle(dense[1], tmp_path / "b", m, seed=1)).read("layers.1.router.weight", 0, rows.numel())
    assert not torch.equal(rows.flatten(), other)


def test_from_a_checkpoint(dense, tmp_path):
    import_(dense[1], tmp_path / "dense")
    one = Archive(upcycle(tmp_path / "dense", tmp_path / "moe", dataclasses.replace(DENSE, name="moe", **COPIES)))
    assert one.extra["layout"] == "upcycled" and one.extra["progress"] == {"step": 0}
    moments = [name for name in one.names() if name.endswith(".exp_avg")]
    assert moments and not any(one.read(name).any() for name in moments)
    export(tmp_path / "moe", tmp_path / "hf", dtype="fp32")
    assert distance(load_pretrained(tmp_path / "hf"), dense[0]) <= 2e-6


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(COPIES, dim=64), "differs from .* in more than routing: dim 64 .there 32."),
        (dict(COPIES, expert_hidden_dim=100), "expert_hidden_dim = 100 does not divide .* 288"),
        (dict(num_dense_layers=3), "has no MoE block"),
    ],
)
def test_what_cannot_be_upcycled(dense, tmp_path, changes, part):
    with pytest.raises(HFError, match=part):
        upcycle(dense[1], tmp_path / "out", dataclasses.replace(DENSE, name="moe", **changes))
    assert not (tmp_path / "out").exists()


def test_a_moe_is_no_source(dense, tmp_path):
    m = dataclasses.replace(DENSE, name="moe", **COPIES)
    upcycle(dense[1], tmp_path / "moe", m)
    with pytest.raises(HFError, match="is a mixture of experts already, 2 of its blocks"):
        upcycle(tmp_path / "moe", tmp_path / "out", m)


def test_training_finds_the_model(dense, tmp_path):
    m = dataclasses.replace(DENSE, name="moe", **COPIES)
    upcycle(dense[1], tmp_path / "moe", m)
    assert load(["model=moe", "data.seq_len=16", "train.global_batch_tokens=64"], tmp_path / "moe").model == m
