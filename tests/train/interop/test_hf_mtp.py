"""Prediction modules under the released names: `transformers` runs what we write, and copies of embedding and head are checked."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shoestring.conf.schema import ModelConfig
from shoestring.parallel.phases import ComputePhase, MicroBatch
from shoestring.train.checkpoint.checkpointer import Archive
from shoestring.train.interop import hf_files
from shoestring.train.interop.hf import HFError, ModelWeights, import_, load_pretrained, write
from shoestring.train.model.decoder import CausalLM
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpModel

M = ModelConfig(
    name="imported", num_layers=3, dim=32, vocab_size=67, max_seq_len=64, num_heads=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, num_dense_layers=1, dense_hidden_dim=44, num_experts=8,
    num_shared_experts=1, top_k=3, expert_hidden_dim=20, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.15, mtp_depth=2,
)  # fmt: skip
EMBED, HEAD = "model.layers.3.embed_tokens.weight", "model.layers.4.shared_head.head.weight"


@pytest.fixture
def folder(build, tmp_path) -> Path:
    write(ModelWeights(build(M)), M, tmp_path / "hf", dtype="fp32")
    return tmp_path / "hf"


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / hf_files.SINGLE)
    edit(tensors)
    save_file(tensors, folder / hf_files.SINGLE)


def losses(model: CausalLM, text_BN: torch.Tensor, seq_len: int) -> torch.Tensor:
    """(1 + depth,): summed token losses of head and prediction modules, through the phases that training runs."""
    batch = MicroBatch(tokens_BS=text_BN[:, :seq_len], targets_BN=text_BN[:, 1:], counted=False)
    values = (batch.tokens_BS,)
    with torch.no_grad():
        for phase in model.stage.phases:
            out = phase.forward(None, batch, *values)
            values = out if isinstance(phase, ComputePhase) else out.wait()
    return values[0]


def test_released_names(folder):
    names = {name.removeprefix("model.layers.4.") for name in load_file(folder / hf_files.SINGLE) if name.startswith("model.layers.4.")}
    assert {name for name in names if not name.startswith(("self_attn.", "mlp."))} == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight",
        "embed_tokens.weight", "shared_head.norm.weight", "shared_head.head.weight",
    }  # fmt: skip
    assert "mlp.gate.e_score_correction_bias" in names and "mlp.experts.7.down_proj.weight" in names


def test_transformers_predicts_what_we_predict(folder, monkeypatch):
    """Its MtpModel reads the modules out of the folder. Its layers get the positions, hidden states and embeddings that ours get.

    It knows modules by the layers that the main model ignores, which are those of DeepSeek-V3's size only: layer 61.
    """
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*", r"model\.layers\.4.*"])
    ours, seq_len = load_pretrained(folder), 9
    text = torch.randint(67, (2, seq_len + 1 + M.mtp_depth), generator=torch.Generator().manual_seed(1))
    main = AutoModelForCausalLM.from_pretrained(folder)
    modules = MtpModel.from_pretrained(main)
    positions = torch.arange(seq_len)[None]
    hidden = main.model(text[:, :seq_len]).last_hidden_state
    wanted = [(main.lm_head(hidden), text[:, 1 : seq_len + 1])]
    for k, layer in enumerate(modules.layers, 1):
        known = main.model.embed_tokens(text[:, k : seq_len + k])
        mask = create_causal_mask(config=main.config, inputs_embeds=known, attention_mask=None, past_key_values=None)
        turns = modules.rotary_emb(known, positions)
        hidden = layer(known, hidden, turns, attention_mask=mask, position_ids=positions, past_key_values=None)
        wanted.append((main.lm_head(hidden), text[:, k + 1 : seq_len + k + 1]))
    sums = torch.stack([torch.nn.functional.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum") for z, t in wanted])
    torch.testing.assert_close(losses(ours, text, seq_len), sums.detach(), rtol=1e-5, atol=0)


def test_the_main_model_needs_no_module(folder):
    """`transformers` leaves modules aside: with a warning, for other sizes than DeepSeek-V3's."""
    tokens = torch.randint(67, (2, 23))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(tokens).logits, load_pretrained(folder)(tokens), rtol=1e-4, atol=1e-5)
    skipped = load_pretrained(folder, mtp="skip")
    assert skipped.m.mtp_depth == 0 and torch.equal(skipped(tokens), load_pretrained(folder)(tokens))


@pytest.mark.parametrize("mtp", ["check", "skip"])
def test_import_has_the_modules_or_not(folder, tmp_path, mtp):
    held = set(Archive(import_(folder, tmp_path / "start", mtp=mtp)).names())
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(M, mtp_depth=2 if mtp == "check" else 0))
    names = {name for name, _ in model.stage.named_parameters()}
    assert {name.removesuffix(".master") for name in held if name.endswith(".master")} == names


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_copy_that_differs_is_refused_unless_told(folder, name):
    original = {EMBED: "model.embed_tokens.weight", HEAD: "lm_head.weight"}[name]
    before = load_pretrained(folder)
    change(folder, lambda t: t[name].__setitem__((-1, -1), 7.0))
    with pytest.raises(HFError, match=f"{name} differs from {original}.*--mtp shared-from-main"):
        load_pretrained(folder)
    forced = load_pretrained(folder, mtp="shared-from-main")
    assert all(torch.equal(a, b) for a, b in zip(before.stage.parameters(), forced.stage.parameters(), strict=True))


def test_a_checkpoint_without_copies_is_read(folder):
    """Some give each weight once."""
    before = load_pretrained(folder)
    change(
        folder, lambda t: [t.pop(name) for name in list(t) if name.endswith((".embed_tokens.weight", ".head.weight")) and "layers" in name]
    )
    after = load_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.stage.parameters(), after.stage.parameters(), strict=True))


def test_a_tied_model(build, tmp_path):
    ours = build(dataclasses.replace(M, tie_embeddings=True))
    write(ModelWeights(ours), ours.m, tmp_path / "hf", dtype="fp32")
    tensors = load_file(tmp_path / "hf" / hf_files.SINGLE)
    assert torch.equal(tensors[HEAD], tensors["model.embed_tokens.weight"])
    text = torch.randint(67, (2, 12))
    assert torch.equal(losses(load_pretrained(tmp_path / "hf"), text, 9), losses(ours, text, 9))


def test_modules_that_config_announces_and_files_lack(folder):
    change(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(("model.layers.3.", "model.layers.4."))])
    with pytest.raises(HFError, match=r"missing model\.layers\.3\..*--skip-mtp does without"):
        load_pretrained(folder)
    assert load_pretrained(folder, mtp="skip").m.mtp_depth == 0
