"""What plans go by (`train/memory.py`, `train/traffic.py`, `train/block_ops.py`) against what rehearsals count: every distinct rank of some
layouts, and any rank of layouts that nobody chose."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.rehearse.command import parse, run
from shoestring.launch.rehearse.formulas import formulas
from shoestring.launch.rehearse.rank import rehearse
from shoestring.parallel import schedule

BASE = "model=small model.num_layers=8 data=synthetic data.seq_len=512 train.global_batch_tokens=65536 train.recompute=[norm,mla_up,swiglu]"
LAYOUTS = [
    "precision=fp8 parallel.pp=2 parallel.ep=4 parallel.schedule=dualpipe parallel.dispatcher=hierarchical cluster.gpus_per_node=2",
    "precision=bf16 parallel.pp=4 parallel.edp=2 parallel.ep=2 model.tie_embeddings=true",
    "precision=bf16 parallel.pp=2 parallel.ep=4 parallel.schedule=interleaved_1f1b parallel.chunks=2 optim.algorithm=muon",
    "precision=fp8 parallel.ep=8 train.micro_batch_sequences=2 train.recompute=[attention,experts]",
    "precision=fp8 parallel.pp=2 parallel.ep=4 parallel.schedule=dualpipev parallel.chunks=2 parallel.dispatcher=deepep model.mtp_depth=1 "
    "cluster.gpus_per_node=2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas_are_what_a_rehearsal_counts(layout):
    for shown in run(parse([*BASE.split(), *layout.split()]), say=lambda line: None):
        agree(shown.measured, shown.formula)


def agree(measured, formula):
    assert measured.params == formula.params and measured.flops == formula.flops
    assert measured.peak_bytes == pytest.approx(formula.peak_bytes, rel=0.05)
    assert {k: v for k, v in measured.sent.items() if v} == pytest.approx({k: v for k, v in formula.sent.items() if v}, rel=1e-12)


@dataclass(frozen=True)
class Case:
    words: tuple[str, ...]
    imbalance: float
    rank: float  # of the world's, as a share


@st.composite
def cases(draw):
    one = lambda *values: draw(st.sampled_from(values))
    pp, ep, edp = one(1, 2, 4), one(1, 2, 4, 8), one(1, 2)
    name = one(*schedule.SCHEDULES)
    chunks = 2 if name in ("interleaved_1f1b", "zbv", "dualpipev") else 1
    layers = pp * chunks + one(0, 1, 3)
    num = 2 * pp * one(1, 2, 5)
    sequences, seq_len = one(1, 2), one(64, 128, 512)
    recompute = draw(st.sets(st.sampled_from(["norm", "mla_up", "swiglu", "attention", "experts"])))
    return Case(
        words=(
            f"model={one('micro', 'small', 'tiny')}", f"model.num_layers={layers}", f"model.num_dense_layers={one(0, 1, layers)}",
            f"model.mtp_depth={one(0, 1, 2)}", f"model.tie_embeddings={one('true', 'false')}", f"model.num_shared_experts={one(0, 1)}",
            f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.edp={edp}", f"parallel.schedule={name}", f"parallel.chunks={chunks}",
            f"parallel.dispatcher={one('alltoall', 'hierarchical', 'deepep') if ep > 1 else 'auto'}", f"cluster.gpus_per_node={one(2, 8)}",
            f"precision={one('bf16', 'fp8', 'fp32')}", f"train.recompute=[{','.join(sorted(recompute))}]",
            f"optim.algorithm={one('adamw', 'muon')}", f"optim.moments={one('fp32', 'bf16')}", f"optim.offload={one('false', 'true')}",
            "data=synthetic", f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}", f"train.micro_batch_sequences={sequences}",
            f"train.global_batch_tokens={seq_len * sequences * num * ep * edp}",
        ),
        imbalance=one(1.0, 1.0, 1.5, 2.0),
        rank=draw(st.floats(0, 1, exclude_max=True)),
    )  # fmt: skip


@settings(max_examples=12)
@given(case=cases())
def test_formulas_of_any_layout(case):
    try:
        config = load(case.words)
        schedule.check(config)
        found = formulas(config, rank := int(case.rank * config.parallel.world_size), imbalance=case.imbalance)
    except ConfigError:
        return
    if config.parallel.dispatcher == "deepep" and (config.precision.compute != "bf16" or config.model.dim % 128):
        return  # which it has no kernels for
    agree(rehearse(config, rank, imbalance=case.imbalance), found)
