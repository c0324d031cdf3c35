"""What plans go by (`train/memory.py`, `train/traffic.py`, `train/block_ops.py`) against what rehearsals of every distinct rank count."""

import pytest
from shoestring.launch.rehearse.command import parse, run

BASE = "model=small model.num_layers=8 data=synthetic data.seq_len=512 train.global_batch_tokens=65536 train.recompute=[norm,mla_up,swiglu]"
LAYOUTS = [
    "precision=fp8 parallel.pp=2 parallel.ep=4 parallel.schedule=dualpipe parallel.dispatcher=hierarchical",
    "precision=fp8 parallel.pp=2 parallel.ep=2 parallel.schedule=dualpipev parallel.chunks=2 model.mtp_depth=1",
    "precision=bf16 parallel.pp=4 parallel.edp=2 parallel.ep=2 model.tie_embeddings=true",
    "precision=bf16 parallel.pp=2 parallel.ep=4 parallel.schedule=interleaved_1f1b parallel.chunks=2 optim.algorithm=muon",
    "precision=fp8 parallel.ep=8 train.micro_batch_sequences=2 train.recompute=[attention,experts]",
    "precision=fp8 parallel.pp=2 parallel.ep=2 parallel.schedule=zbv parallel.chunks=2 train.recompute=[]",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formulas_are_what_a_rehearsal_counts(layout):
    for shown in run(parse([*BASE.split(), *layout.split()]), say=lambda line: None):
        measured, formulas = shown.measured, shown.formula
        assert measured.params == formulas.params
        assert measured.flops == pytest.approx(formulas.flops, rel=0.01)
        assert measured.peak_bytes == pytest.approx(formulas.peak_bytes, rel=0.05)
        if "muon" not in layout:  # which parts no matrix: an owner has more than another
            assert {k: v for k, v in measured.sent.items() if v} == pytest.approx({k: v for k, v in formulas.sent.items() if v}, rel=1e-12)
