"""Good inputs to start from: small files of every kind that Shoestring reads, made by what writes them."""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save
from shoestring.conf import compose
from shoestring.launch import lease
from shoestring.launch.last_try import Ended
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.parallel.trace import Span, write_trace
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.data import tokenizer
from shoestring.train.interop.hf_files import Stored, write_json, write_shards
from shoestring.train.interop.hf_format import pieces, to_hf_config
from shoestring.train.left_out import Window
from shoestring.train.metrics import StepRecord, Summary, to_line, to_plain
from shoestring.train.model.decoder import CausalLM, materialise
from shoestring.train.sessions import Began
from shoestring.train.sessions import Ended as SessionEnded

Files = dict[str, bytes]  # by their paths in a folder

MODEL = [
    "model=tiny", "model.dim=16", "model.num_heads=2", "model.q_lora_rank=8", "model.kv_lora_rank=8", "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.vocab_size=300", "model.num_layers=2", "model.num_dense_layers=1",
    "model.num_experts=4", "model.num_groups=1", "model.num_limited_groups=1", "model.top_k=2", "model.expert_hidden_dim=8",
    "model.dense_hidden_dim=16", "model.num_shared_experts=1",
]  # fmt: skip


@cache
def config():
    return compose.load(["experiment=tiny", *MODEL])


def words() -> list[bytes]:
    return [
        b"experiment=tiny\ntrain.steps=30\noptim.lr=1e-3\nmodel.top_k=2",
        b"model=small\nparallel.pp=2\n~launch",
        b"+name=x\ntrain.steps=1,2",
        b"experiment=deepseek_v3\ncluster=h100\ndata.sources.files.paths=[a.txt]\ndata=files",
    ]


def experiment() -> list[bytes]:
    top = b"# @package _global_\n"
    return [
        top + b"defaults:\n  - override /model: small\n  - _self_\nname: mine\ntrain:\n  steps: 90\noptim: {lr: 1.0e-3}\n",
        top + b"phases:\n  main: {train: {tokens: 9999}}\n  long: {train: {tokens: 99999}, data: {seq_len: 64}}\n",
        b"train: {steps: ${optim.warmup_steps}}\n",
    ]


def saved_config() -> list[bytes]:
    return [compose.to_yaml(config()).encode()]


# ---------------------------------------------------------------- a run's directory


def run_directory() -> Files:
    records = [
        StepRecord(
            step=i + 1, tokens=64 * (i + 1), samples=i + 1, loss=6.0 - i / 10, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=0.5,
            tokens_per_second=128.0, tokens_per_second_per_gpu=64.0, mfu=0.1, seconds=1.0 + i, dollars=0.01 * i, gpu_hours=0.001,
            dollars_per_billion_tokens=3.0, eta_seconds=9.0, eval_loss=5.5 if i == 3 else None, expert_load=[[10, 20, 30, 4]],
            max_vio=[0.5], max_vio_mean=0.5, dead_experts=0, router_entropy=1.3, memory_gb=0.4, data_seconds=0.01, eval_seconds=0.1,
            checkpoint="saved step 4", checkpoint_seconds=0.01, breakdown={"compute": 0.4, "exchange": 0.05, "bubble": 0.05},
            time_unix=1.7e9 + i, session=i // 4, batch_tokens=64, seq_len=16,
        )
        for i in range(8)
    ]  # fmt: skip
    lines = [to_line(record).encode() for record in records]
    summary = Summary(
        name="mine", steps=8, tokens=512, loss_first=6.0, loss_last=5.3, eval_loss=5.5, tokens_per_second=128.0, mfu=0.1, dollars=0.1,
        seconds=9.0, world_size=1, layout="pp 1 x edp 1 x ep 1", device="cpu",
    )  # fmt: skip
    begun = Began(session=0, job="j", time_unix=1.7e9, boot="b", monotonic=1.0, seconds=0.0, devices=1, dollars=1e-4, layout="pp 1")
    ended = SessionEnded(session=0, seconds=5.0, standing=0.1, time_unix=1.7e9 + 5, dollars=0.05, gpu_hours=0.001)
    alert = {"kind": "stall", "firing": True, "text": "no step for 60 s", "step": 3, "time_unix": 1.7e9, "seconds": 3.0, "dollars": 0.01}
    at = lambda m: {"start": 0.1 * m, "end": 0.1 * m + 0.05}
    spans = [Span(rank=r, what="compute", kind=kind, stage=r, micro_batch=m, phase="attn", **at(m))
             for r in (0, 1) for m, kind in enumerate("FFBBW")]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_trace(Path(folder, "t.json"), spans, step=2, seconds=0.5, bubble=0.1)
        trace = Path(folder, "t.json").read_bytes()
    return {
        "config.yaml": saved_config()[0],
        "metrics.jsonl": b"".join(lines),
        "metrics_lost.jsonl": lines[2],
        "summary.json": json.dumps(to_plain(summary)).encode(),
        "sessions.jsonl": "".join(json.dumps(asdict(event)) + "\n" for event in (begun, ended)).encode(),
        "alerts.jsonl": json.dumps(alert).encode() + b"\n" + json.dumps(alert | {"firing": False}).encode() + b"\n",
        "ending.json": json.dumps(asdict(Ended(code=5, what="rank 1 was killed", time_unix=1.7e9))).encode(),
        "lease.json": json.dumps(asdict(lease.Owner(host="h", boot="b", pid=1, born=2, session="s", count=3))).encode(),
        "left_out.json": json.dumps([asdict(Window(stream=0, first=3, last=5, why="not a number"))]).encode(),
        "traces/step_2.json": trace,
    }


# ---------------------------------------------------------------- checkpoints and models


@cache
def _model() -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(config().model)
    materialise(model.stage, seed=0)
    return model


@cache
def checkpoint() -> Files:
    """checkpoints/latest and one checkpoint, of two tensors with an `extra` as runs have it."""
    extra = {
        "progress": {"step": 1, "tokens": 64, "samples": 1, "stream": 0, "sample": 1}, "phases": [["main", 0]],
        "model": asdict(config().model), "tokenizer": "abc", "layout": "pp 1", "precision": "bf16", "guard": {}, "replay_agreed": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"embed.master": torch.arange(32.0), "layers.1.router.bias": torch.zeros(4)}
        chunks = {name: Chunk(t.numel(), 0, t) for name, t in tensors.items()}
        Checkpointer(Path(folder, "checkpoints"), keep_last=2, async_save=False).save(1, chunks, extra)
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@cache
def hf_folder(*, sharded: bool = False) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        model, stored = _model(), []
        weights = dict(model.stage.named_parameters()) | dict(model.stage.named_buffers())
        for piece in pieces(config().model):
            if piece.numel and not piece.implied and not piece.copy:
                rows = weights[piece.weight].detach().float().flatten()[piece.offset : piece.offset + piece.numel]
                stored.append(Stored(name=piece.name, shape=piece.shape, dtype=torch.float32, blocks=lambda rows=rows: [rows]))
        write_json(Path(folder, "config.json"), to_hf_config(config().model, "fp32"))
        write_shards(Path(folder), stored, 10_000 if sharded else 1e9)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def header_of(blob: bytes) -> bytes:
    """The start of a safetensors file: its length and its header."""
    return blob[: 8 + int.from_bytes(blob[:8], "little")]


@cache
def tokenizers() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for n, one in enumerate((tokenizer.ByteTokenizer(), tokenizer.train_bpe(["a few words of text " * 9], 280, fim=True))):
            one.save(Path(folder, f"{n}.json"))
            made.append(Path(folder, f"{n}.json").read_bytes())
        return made


# ---------------------------------------------------------------- data


def lines() -> list[bytes]:
    return [b'{"text": "one"}\n{"text": "two \\u2615"}\n\n{"text": null}\n', b'{"id": 1, "text": "x"}']


def text() -> list[bytes]:
    return ["one\r\ntwo\n\nthree ☕\n".encode(), b"\xef\xbb\xbfa\rb"]


def packed(contents: Callable[[], list[bytes]]) -> Callable[[], list[bytes]]:
    return lambda: [gzip.compress(content, mtime=0) for content in contents()]


def parquet() -> list[bytes]:
    made = []
    for options in ({}, {"compression": "gzip", "use_dictionary": False}):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": i, "text": f"text {i} ☕"} for i in range(9)]), file, **options)
        made.append(file.getvalue())
    return made


def plans() -> list[bytes]:
    plan = {"words": ["experiment=tiny", "parallel.pp=1"], "layout": "pp 1", "gpus": 8}
    return [json.dumps({"format": "shoestring plan 1", "projected": True, "request": {}, "notes": [], "plans": [plan, plan]}).encode()]


def loads() -> list[bytes]:
    return [b"".join(json.dumps({"step": i, "expert_load": [[1, 2, 3, 4]]}).encode() + b"\n" for i in range(3))]


def routing() -> list[bytes]:
    return [save({"layers.1": torch.randint(0, 4, (2, 3, 5, 2), generator=torch.Generator().manual_seed(0))})]


def piece_record() -> list[bytes]:
    return [json.dumps({"documents": 3, "bad": 0, "train_tokens": 10, "eval_tokens": 2, "sha256": "0" * 64}).encode()]
