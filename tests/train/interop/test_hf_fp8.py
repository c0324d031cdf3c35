"""FP8 checkpoints: quantised as DeepSeek-V3 was released, read to FP32, and the same bytes again. Sizes have ragged blocks of 128."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shoestring.conf.compose import load
from shoestring.conf.schema import ModelConfig
from shoestring.train.checkpoint.checkpointer import Archive
from shoestring.train.data.tokenizer import train_bpe
from shoestring.train.interop import hf_files
from shoestring.train.interop.hf import HFError, ModelWeights, export, import_, load_pretrained, write
from shoestring.train.interop.hf_format import pieces
from shoestring.train.interop.hf_fp8 import dequantise, quantise, scales
from transformers import AutoModelForCausalLM

# Of the two, `transformers` reads the second on a CPU: there it takes a block's size from the number of blocks, which is 128 only where
# 128 divides the size, or where there is one block.
RAGGED = ModelConfig(
    name="imported", num_layers=3, dim=160, vocab_size=259, max_seq_len=64, num_heads=2, q_lora_rank=12, kv_lora_rank=136,
    qk_nope_head_dim=64, qk_rope_head_dim=16, v_head_dim=24, num_dense_layers=1, dense_hidden_dim=300, num_experts=8, top_k=3,
    num_shared_experts=1, expert_hidden_dim=129, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.06, mtp_depth=1,
)  # fmt: skip
EVEN = dataclasses.replace(
    RAGGED, mtp_depth=0, dim=256, kv_lora_rank=64, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    dense_hidden_dim=384, expert_hidden_dim=128,
)  # fmt: skip


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def weight(shape, spread: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


# ---------------------------------------------------------------- the cast

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, spread=st.sampled_from([0.0, 1.0, 4.0]), power=st.integers(-40, 20), seed=st.integers(0, 99))
def test_quantised_again_nothing_changes(shape, spread, power, seed):
    w = weight(shape, spread, seed) * 2.0**power
    codes, scale = quantise(w), scales(w)
    back = dequantise(codes, scale)
    assert torch.equal(scales(back), scale)
    assert torch.equal(quantise(back).view(torch.uint8), codes.view(torch.uint8))


def test_every_scale_survives():
    """A column of blocks of one magnitude each, through the floats from 1 to 2: amax is not always 448 scales, and the scale survives."""
    amax = (torch.tensor(1.0).view(torch.int32) + torch.arange(0, 1 << 23, 1049, dtype=torch.int32)).view(torch.float32)
    w = amax.repeat_interleave(128)[:, None]
    assert (amax / 448 * 448 != amax).any()
    scale = scales(w)
    assert torch.equal(scales(dequantise(quantise(w), scale)), scale)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_blocks_against_a_plain_reference(shape, seed):
    """Block by block in FP64: the scale is amax / 448 to two units in the last place, the error half a step of E4M3 (1/16, or 2**-10
    scales where that is subnormal)."""
    w = weight(shape, 1.0, seed)
    scale, back = scales(w), dequantise(quantise(w), scales(w))
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, j in torch.cartesian_prod(*(torch.arange(n) for n in scale.shape)).view(-1, 2).tolist():
        here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        assert abs(scale[i, j].double() * 448 / w[here].abs().max().double() - 1) < 2.5e-7
        error = (back[here] - w[here]).abs().double()
        assert (error <= (w[here].abs().double() / 16).clamp(min=scale[i, j].item() * 2**-10) * (1 + 1e-6)).all()


def test_a_block_of_zeros():
    w = torch.zeros(130, 5)
    assert torch.equal(dequantise(quantise(w), scales(w)), w) and (scales(w) > 0).all()


# ---------------------------------------------------------------- checkpoints


def test_the_tensors_of_deepseek_v3_as_released():
    """Its files have 91,991 tensors of 688,574,839,360 bytes together, scales, and the prediction module's copies, included."""
    m = dataclasses.replace(load(["model=deepseek_v3"]).model, mtp_depth=1)
    count = size = 0
    for p in pieces(m):
        count += 1 + p.quantised
        size += p.numel * (1 if p.quantised else 4 if p.is_selection_bias else 2)
        size += 4 * -(-p.shape[0] // 128) * -(-p.shape[-1] // 128) if p.quantised else 0
    assert (count, size) == (91_991, 688_574_839_360)


@pytest.mark.parametrize("m", [RAGGED, EVEN], ids=["ragged, with prediction", "even"])
def test_export_import_export_gives_the_same_bytes(build, tmp_path, m):
    train_bpe(["def f(x):\n    return x\n"] * 9, 259).save(tmp_path / "tokenizer.json")
    options = dict(dtype="fp8", max_shard_bytes=300_000)
    write(ModelWeights(build(m)), m, tmp_path / "one", tokenizer=tmp_path / "tokenizer.json", **options)
    made = import_(tmp_path / "one", tmp_path / "start")
    masters = Archive(made)
    assert {masters.read(name, 0, 1).dtype for name in masters.names()} == {torch.float32}
    export(tmp_path / "start", tmp_path / "two", **options)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()} for kind in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 6
    assert all(one[name] == two[name] for name in one)


def test_what_is_quantised(build, tmp_path):
    """Linear layers of attention, dense block, experts and shared experts: not embedding, head, norms, gate, nor a prediction's merge."""
    write(ModelWeights(build(RAGGED)), RAGGED, tmp_path / "hf", dtype="fp8")
    stored = tensors_of(tmp_path / "hf")
    quantised = {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")} == quantised
    assert {name.split(".")[-2] for name in quantised} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert {name.split(".")[-2] for name in stored.keys() - quantised if stored[name].dtype == torch.bfloat16} == {
        "embed_tokens", "lm_head", "head", "gate", "eh_proj", "norm", "enorm", "hnorm", "input_layernorm", "post_attention_layernorm",
        "q_a_layernorm", "kv_a_layernorm",
    }  # fmt: skip
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128] and config["dtype"] == "bfloat16"


def test_transformers_loads_fp8(build, tmp_path):
    """Without a GPU it de-quantises; in FP32, so that logits can be compared."""
    write(ModelWeights(build(EVEN)), EVEN, tmp_path / "hf", dtype="fp8", max_shard_bytes=1e6)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    theirs.float()  # what was not quantised is still BF16
    ours = load_pretrained(tmp_path / "hf")
    tokens = torch.randint(EVEN.vocab_size, (2, 23), generator=torch.Generator().manual_seed(1))
    wanted, found = theirs(tokens).logits, ours(tokens)
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5
    masters = build(EVEN)(tokens)
    assert ((found - masters).norm() / masters.norm()).item() > 1e-3  # it was quantised


NAME = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    "edit, part",
    [
        (lambda t: t.pop(NAME + "_scale_inv"), f"{NAME} is stored as F8_E4M3; readable with quantization_config"),
        (lambda t: t.update({NAME + "_scale_inv": torch.ones(1, 2)}), f"{NAME}_scale_inv of shape (2, 2) in F32"),
        (lambda t: t.update({NAME + "_scale_inv": torch.ones(2, 2, dtype=torch.bfloat16)}), "in F32"),
        (lambda t: t.update({NAME: torch.zeros(129, 160)}), f"unexpected {NAME}_scale_inv"),
        (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(2, 2)}), "unexpected lm_head.weight_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_refused(build, tmp_path, edit, part):
    m = dataclasses.replace(RAGGED, mtp_depth=0)
    write(ModelWeights(build(m)), m, tmp_path / "hf", dtype="fp8")
    tensors = tensors_of(tmp_path / "hf")
    edit(tensors)
    save_file(tensors, tmp_path / "hf" / hf_files.SINGLE)
    with pytest.raises(HFError) as error:
        load_pretrained(tmp_path / "hf")
    assert part in str(error.value)


def test_codes_without_a_quantization_config_are_refused(build, tmp_path):
    write(ModelWeights(build(EVEN)), EVEN, tmp_path / "hf", dtype="fp8")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HFError, match="readable with quantization_config"):
        load_pretrained(tmp_path / "hf")
