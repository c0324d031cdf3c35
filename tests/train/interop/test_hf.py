"""To and from Hugging Face: the same logits on both sides, every tensor accounted for, and nothing half-right is accepted.

That logits and gradients equal `transformers` for many configurations is in test_equals_transformers.py; FP8 is in test_hf_fp8.py,
multi-token prediction in test_hf_mtp.py, memory in test_hf_memory.py, config.json in test_hf_config.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shoestring.conf.compose import load, to_yaml
from shoestring.conf.schema import ModelConfig, YarnConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.parallel.phases import MicroBatch
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.data.tokenizer import train_bpe
from shoestring.train.engine import Engine
from shoestring.train.interop import hf_files, hf_format
from shoestring.train.interop.hf import HFError, ModelWeights, export, import_, load_pretrained, write
from shoestring.train.interop.hf_format import pieces, weight_shapes
from shoestring.train.model.decoder import CausalLM, materialise
from transformers import AutoModelForCausalLM, AutoTokenizer

YARN = YarnConfig(factor=4.0, original_max_seq_len=16, beta_fast=8.0, mscale=1.0, mscale_all_dim=1.0)


def small(**changes) -> ModelConfig:
    fields = dict(
        name="imported", num_layers=3, dim=32, vocab_size=67, max_seq_len=64, num_heads=2, q_lora_rank=12, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, num_dense_layers=1, dense_hidden_dim=44, num_experts=8,
        num_shared_experts=1, top_k=3, expert_hidden_dim=20, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.15,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


SHAPES = {
    "deepseek-v3 in small": small(),
    "no q latent, YaRN, two shared": small(q_lora_rank=0, yarn=YARN, num_shared_experts=2),
    "tied, one group, not normalised": small(tie_embeddings=True, num_groups=1, num_limited_groups=1, norm_topk=False),
    "no shared expert, no dense block": small(num_shared_experts=0, num_dense_layers=0),
    "only dense blocks": small(num_dense_layers=3),
    "DeepSeek-V2-Lite in small": small(
        score_func="softmax", q_lora_rank=0, num_groups=1, num_limited_groups=1, norm_topk=False, route_scale=1.0, num_shared_experts=2,
        yarn=YarnConfig(factor=40.0, original_max_seq_len=16, mscale=0.707, mscale_all_dim=0.707),
    ),
    "Moonlight in small": small(
        q_lora_rank=0, num_groups=1, num_limited_groups=1, route_scale=2.446, num_shared_experts=2, rope_theta=50000.0, norm_eps=1e-5
    ),
}  # fmt: skip


def tokens(m: ModelConfig, seed: int = 1) -> torch.Tensor:
    return torch.randint(m.vocab_size, (2, 23), generator=torch.Generator().manual_seed(seed))


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def folder(build, tmp_path) -> Path:
    """A checkpoint of SHAPES[first] in several shards."""
    model = build(small())
    write(ModelWeights(model), model.m, tmp_path / "hf", dtype="fp32", max_shard_bytes=40_000)
    return tmp_path / "hf"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("m", [*SHAPES.values(), load(["model=tiny"]).model], ids=[*SHAPES, "tiny"])
def test_pieces_cover_every_weight_once(m, stacked):
    filled = {name: torch.zeros(shape, dtype=torch.int8).flatten() for name, shape in weight_shapes(m).items()}
    names = []
    for p in pieces(m, stacked=stacked):
        names.append((p.name, p.index))
        for first, last in p.blocks():
            filled[p.weight][p.offset + first * p.row_numel : p.offset + last * p.row_numel] += not p.copy
    assert all((count == 1).all() for count in filled.values())
    assert len(names) == len(set(names))


def test_deepseek_v3_has_the_released_tensors():
    """Counted by hand: 3 outside the blocks; 9 per block; 3 per dense block; gate, bias, 3 shared and 3 per expert in the others."""
    m = dataclasses.replace(load(["model=deepseek_v3"]).model, mtp_depth=0)
    by_name = {p.name: p.shape for p in pieces(m)}
    assert len(by_name) == 3 + 61 * 9 + 3 * 3 + 58 * (2 + 3 + 256 * 3)
    assert by_name["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert by_name["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert by_name["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)


# ---------------------------------------------------------------- to transformers and back


@pytest.mark.parametrize("m", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_loads_what_we_write(build, m, tmp_path):
    ours = build(m)
    write(ModelWeights(ours), m, tmp_path / "hf", dtype="fp32", max_shard_bytes=40_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.model.embed_tokens.padding_idx is None  # a padding row would get no gradient
    assert relative(theirs(tokens(m)).logits, ours(tokens(m))) <= 1e-5

    theirs.save_pretrained(tmp_path / "one by one", max_shard_size="50KB")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    for kind in ("hf", "one by one", "stacked"):
        back = load_pretrained(tmp_path / kind)
        assert back.m == dataclasses.replace(m, name="imported")
        assert torch.equal(back(tokens(m)), ours(tokens(m)))


def test_bf16(build, tmp_path):
    """Weights are rounded once; the selection bias, which steps of 0.001 have moved, is not."""
    ours = build(small())
    write(ModelWeights(ours), ours.m, tmp_path / "hf", dtype="bf16")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: t.dtype for name, t in stored.items() if t.dtype != torch.bfloat16} == {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias": torch.float32 for i in (1, 2)
    }
    assert torch.equal(stored["model.layers.1.mlp.gate.e_score_correction_bias"], ours.stage.layers["1"].router.bias)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    back = load_pretrained(tmp_path / "hf", dtype="auto")
    assert back.stage.embed.dtype == torch.bfloat16 and back.stage.layers["1"].router.bias.dtype == torch.float32
    wide = load_pretrained(tmp_path / "hf")
    assert relative(wide(tokens(ours.m)), theirs.float()(tokens(ours.m)).logits) <= 1e-5


def test_shards_stay_small(build, tmp_path):
    model, limit = build(small()), 30_000
    write(ModelWeights(model), model.m, tmp_path / "hf", dtype="fp32", max_shard_bytes=limit)
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert len(sizes) > 3 and max(sizes) <= limit
    index = json.loads((tmp_path / "hf" / hf_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_files_do_not_depend_on_the_size_of_blocks(build, tmp_path, monkeypatch, dtype):
    """Experts, embeddings, norms and scales in one block each, and in many."""
    m = small(dim=136, expert_hidden_dim=300, vocab_size=259)  # blocks of 128 rows; the last has 44, and 3
    write(ModelWeights(build(m)), m, tmp_path / "one", dtype=dtype)
    monkeypatch.setattr(hf_format, "BLOCK", 1)
    write(ModelWeights(build(m)), m, tmp_path / "many", dtype=dtype)
    assert (tmp_path / "one" / hf_files.SINGLE).read_bytes() == (tmp_path / "many" / hf_files.SINGLE).read_bytes()


def test_a_softmax_router_with_a_selection_bias_is_not_written(build, tmp_path):
    ours = build(SHAPES["DeepSeek-V2-Lite in small"])
    ours.stage.layers["2"].router.bias[3] = 1e-3
    with pytest.raises(HFError, match=r"layers\.2\.router\.bias is not zero"):
        write(ModelWeights(ours), ours.m, tmp_path / "hf", dtype="fp32")


def test_nothing_is_left_of_a_failed_export(build, tmp_path):
    model = build(small())

    class Failing(ModelWeights):
        def read(self, name, start, stop):
            if name == "norm":
                raise OSError("disk gone")
            return super().read(name, start, stop)

    with pytest.raises(OSError):
        write(Failing(model), model.m, tmp_path / "hf", dtype="fp32", max_shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == []


def test_an_export_overwrites_nothing(build, folder):
    model = build(small())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(HFError, match="is not an empty folder"):
        write(ModelWeights(model), model.m, folder, dtype="fp32")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_source_of_another_model_is_refused(build, tmp_path):
    model = build(small())
    for m, part in ((small(num_layers=4), "lack layers.3"), (small(num_layers=2), "that its model does not: layers.2")):
        with pytest.raises(HFError, match=part):
            write(ModelWeights(model), m, tmp_path / "hf", dtype="fp32")


# ---------------------------------------------------------------- what is refused


def change(folder: Path, edit) -> None:
    """`edit` all tensors, then write them as a single file."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / hf_files.INDEX).unlink()
    edit(tensors)
    save_file(tensors, folder / hf_files.SINGLE)


UP = "model.layers.2.mlp.experts.7.up_proj.weight"
MTP = "model.layers.3.eh_proj.weight"


@pytest.mark.parametrize(
    "edit, part",
    [
        (lambda t: t.pop(UP), f"missing {UP}"),
        (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "missing model.layers.1.mlp.gate.e_score_correction_bias"),
        (lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": t[UP].clone()}), "unexpected model.layers.2.mlp.experts.8"),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), f"{UP} has shape (32, 20), and config.json asks for (20, 32)"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} is stored as I8"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} is stored as F8_E4M3"),
        (lambda t: t.update({UP + "_scale_inv": torch.ones(1, 1)}), f"unexpected {UP}_scale_inv"),
        (lambda t: t.update({MTP: torch.ones(1, 1)}), f"past the last one, 2 (multi-token prediction): {MTP}"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(1, 1)}), "unexpected model.layers.0.self_attn.q_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, edit, part):
    change(folder, edit)
    with pytest.raises(HFError) as error:
        load_pretrained(folder)
    assert part in str(error.value)
    with pytest.raises(HFError):
        import_(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mtp_layers_are_left_out_when_told(folder):
    wanted = load_pretrained(folder)(tokens(small()))
    change(folder, lambda t: t.update({MTP: torch.ones(1, 1)}))
    assert torch.equal(load_pretrained(folder, mtp="skip")(tokens(small())), wanted)


@pytest.mark.parametrize("equal", [True, False])
def test_a_second_copy_of_a_tied_table(build, tmp_path, equal):
    model = build(small(tie_embeddings=True))
    write(ModelWeights(model), model.m, tmp_path / "hf", dtype="fp32", max_shard_bytes=40_000)
    change(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0.0 if equal else 1e-6)}))
    if equal:
        assert torch.equal(load_pretrained(tmp_path / "hf")(tokens(model.m)), model(tokens(model.m)))
    else:
        with pytest.raises(HFError, match=r"lm_head.weight differs"):
            load_pretrained(tmp_path / "hf")


def _edit_index(folder, edit):
    index = json.loads((folder / hf_files.INDEX).read_text())
    edit(index["weight_map"])
    (folder / hf_files.INDEX).write_text(json.dumps(index))


def _first(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    "damage, part",
    [
        (lambda f: _first(f).unlink(), "the file is missing"),
        (lambda f: _first(f).write_bytes(_first(f).read_bytes()[:-1]), "is not a whole safetensors file"),
        (lambda f: _edit_index(f, lambda w: w.pop(UP)), f"does not list {UP}"),
        (lambda f: _edit_index(f, lambda w: w.update({UP: _first(f).name})), f"says that {UP} is in {'model-00001'}"),
        (lambda f: _edit_index(f, lambda w: w.update({UP: "../elsewhere.safetensors"})), "is not the name of a safetensors file in"),
        (lambda f: (f / hf_files.INDEX).write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / hf_files.INDEX).unlink(), "has neither"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, part):
    damage(folder)
    with pytest.raises(HFError) as error:
        load_pretrained(folder)
    assert part in str(error.value)


# ---------------------------------------------------------------- runs

TINY = [
    "model.num_layers=3", "model.dim=32", "model.vocab_size=300", "model.dense_hidden_dim=64", "model.expert_hidden_dim=16",
    "model.num_heads=2", "data.seq_len=16", "train.global_batch_tokens=256", "train.eval_sequences=4",
]  # fmt: skip


def _save_run(config, run_dir):
    engine = Engine(config)
    engine.biases += torch.arange(engine.biases.numel()).view_as(engine.biases) * 1e-3
    extra = {"progress": {"step": 0}, "model": dataclasses.asdict(config.model), "precision": config.precision.compute}
    Checkpointer(run_dir / "checkpoints", keep_last=1, async_save=False).save(7, engine.chunks(saving=True), extra)


def test_a_run_of_four_ranks_is_exported_whole(tmp_path):
    config = load([*TINY, "parallel.pp=2", "parallel.ep=2", "precision=bf16"])
    run_dir = tmp_path / "run"
    fork_ranks(4, _save_run, config, run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    train_bpe(["def f(x):\n    return x\n"] * 9, 300).save(run_dir / "tokenizer.json")

    assert export(run_dir, tmp_path / "hf").name == "step_00000007"
    with torch.device("meta"):
        alone = CausalLM(config.model, torch.bfloat16)
    materialise(alone.stage, seed=config.train.seed)
    for i, layer in enumerate(("1", "2")):
        alone.stage.layers[layer].router.bias += (torch.arange(16) + 16 * i) * 1e-3
    back = load_pretrained(tmp_path / "hf", dtype="auto")
    wanted = {**dict(alone.stage.named_parameters()), **dict(alone.stage.named_buffers())}
    found = {**dict(back.stage.named_parameters()), **dict(back.stage.named_buffers())}
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def g(x):\n    return 'ünï'\n"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == theirs.eos_token_id is not None

    one = export(run_dir / "checkpoints" / "step_00000007", tmp_path / "fp32", dtype="fp32", max_shard_bytes=1e5)
    assert one.name == "step_00000007" and len(list((tmp_path / "fp32").glob("*.safetensors"))) > 3


def _checkpoint_of(model: CausalLM, folder: Path, *, order: dict[str, list[int]]) -> Path:
    """As a run would have saved it, with experts in slots in the given order by layer, and an average that is twice the weights."""
    chunks = {}
    for name, tensor in [*model.stage.named_parameters(), *model.stage.named_buffers()]:
        if ".experts." in name:
            tensor = tensor[order[name.split(".")[1]]]
        flat = tensor.detach().flatten().clone()
        suffixed = {name: flat} if name.endswith(".bias") else {f"{name}.master": flat, f"{name}.ema": 2 * flat}
        chunks |= {key: Chunk(len(value), 0, value) for key, value in suffixed.items()}
    extra = {"progress": {"step": 1}, "model": dataclasses.asdict(model.m), "precision": "fp32", "placement": order}
    Checkpointer(folder / "checkpoints", keep_last=1, async_save=False).save(1, chunks, extra)
    return folder


def test_moved_experts_are_exported_in_order(build, tmp_path):
    model = build(small())
    run = _checkpoint_of(model, tmp_path / "run", order={"1": [3, 1, 0, 2, 7, 6, 5, 4], "2": [1, 2, 3, 4, 5, 6, 7, 0]})
    export(run, tmp_path / "hf")
    write(ModelWeights(model), model.m, tmp_path / "wanted", dtype="fp32")
    assert (tmp_path / "hf" / hf_files.SINGLE).read_bytes() == (tmp_path / "wanted" / hf_files.SINGLE).read_bytes()


def test_the_average_is_exported(build, tmp_path):
    model, order = build(small()), {"1": list(range(8)), "2": list(range(8))}
    run = _checkpoint_of(model, tmp_path / "run", order=order)
    export(run, tmp_path / "hf", weights="ema")
    found = load_pretrained(tmp_path / "hf").stage
    for name, weight in model.stage.named_parameters():
        assert torch.equal(found.get_parameter(name), 2 * weight), name
    assert torch.equal(found.layers["1"].router.bias, model.stage.layers["1"].router.bias)


def test_a_run_without_an_average(build, tmp_path):
    model = build(small())
    write(ModelWeights(model), model.m, tmp_path / "hf", dtype="fp32")
    import_(tmp_path / "hf", tmp_path / "start")
    with pytest.raises(HFError, match=r"holds no ema weights: was optim\.ema_decay 0\?"):
        export(tmp_path / "start", tmp_path / "out", weights="ema")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(HFError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "hf")


def _loss_of_first(config, checkpoint, batch):
    """(mean loss, sum of all moments) of an engine that begins with `checkpoint`."""
    engine = Engine(config)
    extra = Checkpointer(checkpoint.parent, keep_last=1, async_save=False).load(checkpoint, engine.chunks(saving=False))
    engine.optimizer.load_state(extra["progress"]["step"])
    mine = batch.chunk(config.parallel.dp)[engine.mesh.dp_rank]
    loss, count, _ = engine.evaluate([MicroBatch(tokens_BS=b[:, :-1], targets_BN=b[:, 1:]) for b in mine.split(1)])
    return loss / count, sum(c.data.abs().sum().item() for name, c in engine.optimizer.state().items() if not name.endswith(".master"))


@pytest.mark.parametrize("layout", [["parallel.pp=1"], ["parallel.pp=2", "parallel.ep=2"]])
def test_training_starts_from_an_import(build, tmp_path, layout):
    model = build(small(vocab_size=259))
    write(ModelWeights(model), model.m, tmp_path / "hf", dtype="fp32", max_shard_bytes=40_000)
    checkpoint = import_(tmp_path / "hf", tmp_path / "start", name="mine")
    words = ["model=mine", "data.seq_len=16", "train.global_batch_tokens=64", "train.eval_sequences=4", *layout]
    config = load(words, tmp_path / "start")
    assert config.model == dataclasses.replace(model.m, name="mine")

    batch = torch.randint(259, (4, 17), generator=torch.Generator().manual_seed(3))
    answers = fork_ranks(config.parallel.world_size, _loss_of_first, config, checkpoint, batch)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    wanted = F.cross_entropy(theirs(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    for loss, moments in answers:
        assert loss == pytest.approx(wanted, rel=1e-5) and moments == 0
