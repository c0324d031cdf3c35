"""The command: what it takes, what it shows, what it refuses; and what every rehearsal must keep to."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch import cli, exit_codes
from shoestring.launch.rehearse.command import parse, run
from shoestring.launch.rehearse.rank import enough, rehearse
from shoestring.train import cost

SMALL = [
    "model=micro", "data=synthetic", "data.seq_len=64", "parallel.pp=2", "parallel.ep=2",
    "train.global_batch_tokens=2048",
]  # fmt: skip


def test_tables_and_json(tmp_path, capsys):
    out = tmp_path / "new" / "rehearsal.json"
    assert cli.main(["rehearse", *SMALL, f"out={out}"]) == exit_codes.OK
    text = capsys.readouterr().out
    assert "6 of a step's 16 micro-batches were run" in text and "2 of 4 ranks rehearsed" in text
    content = json.loads(out.read_text())
    assert [rank["stands_for"] for rank in content["ranks"]] == ["0-1", "2-3"]
    for rank in content["ranks"]:
        measured, formulas = rank["measured"], rank["formulas"]
        assert measured["params"] == formulas["params"]
        assert measured["flops"] == pytest.approx(formulas["flops"], rel=0.01)
        assert measured["peak_bytes"] == sum(measured["by_category"].values()) == pytest.approx(formulas["peak_bytes"], rel=0.05)
        sent = lambda of: {(s["collective"], s["link"]): s["bytes"] for s in of["sent"]}
        assert sent(measured) == pytest.approx(sent(formulas), rel=1e-12)
    params = cost.num_params(load(SMALL).model)
    dense, experts = (sum(rank["measured"]["params"][kind] for rank in content["ranks"]) for kind in ("dense", "expert"))
    assert dense + 2 * experts == params.total  # both ranks of a stage have half its experts


def test_ranks_by_number():
    shown = run(parse([*SMALL, "ranks=3,0", "imbalance=1.5"]), say=lambda line: None)
    assert [s.measured.rank for s in shown] == [3, 0] and [s.ranks for s in shown] == [[3], [0]]
    even = run(parse([*SMALL, "ranks=3"]), say=lambda line: None)
    assert shown[0].measured.peak_bytes > even[0].measured.peak_bytes
    assert shown[0].measured.sent["combine F", "intra"] > even[0].measured.sent["combine F", "intra"]


REFUSED = {
    "ranks=4": "ranks 0 to 3",
    "ranks=first": "all-distinct, or numbers",
    "imbalance=much": "must be a number",
    "imbalance=9": "must be from 1",
    "optim.engine=deepspeed": "rehearsal runs ours",
}


@pytest.mark.parametrize(("word", "why"), REFUSED.items(), ids=REFUSED)
def test_refused(word, why):
    with pytest.raises(ConfigError, match=why):
        run(parse([*SMALL, word]), say=lambda line: None)


def test_counted_on_as_if_all_had_run():
    """Of 6 micro-batches, and of all 16 as the schedule's least."""
    some, config = rehearse(load(SMALL), 0), load([*SMALL, "train.global_batch_tokens=768"])
    assert enough(config) == config.num_micro_batches == 6
    whole = rehearse(config, 0)
    assert some.micro_batches == 6 and some.flops * 6 == whole.flops * 16
    exchanged = lambda r: {key: n for key, n in r.sent.items() if key[0] not in ("reduce", "gather", "scalars")}
    assert {key: n * 6 for key, n in exchanged(some).items()} == {key: n * 16 for key, n in exchanged(whole).items()}
    assert some.peak_bytes - whole.peak_bytes == 10 * 64 * 2 * 8  # of the others, the tokens


# What stands behind an operator of ours: on meta it must never run.
BEHIND = ["rms_norm", "quantise", "row_maps", "permute", "router", "swiglu", "e5m6", "fp8_linear", "fp8_grouped"]


def test_no_reference_runs(monkeypatch):
    def never(*_, **__):
        raise AssertionError("the reference of an operator ran")

    replaced = 0
    for module in (importlib.import_module(f"shoestring.kernels.{name}") for name in BEHIND):
        for name in [name for name in vars(module) if name.endswith("_reference")]:
            monkeypatch.setattr(module, name, never)
            replaced += 1
    assert replaced > 12
    words = [*SMALL, "precision=fp8", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "model.v_head_dim=16"]
    assert rehearse(load(words), 2).by_category["casts"]


def test_thousands_of_ranks():
    config = load(["experiment=deepseek_v3", "data=synthetic"])
    r = rehearse(replace(config, train=replace(config.train, global_batch_tokens=4 * 128 * 4096)), 2047)
    params = cost.num_params(config.model)
    assert r.stages == {15: [60, 61]} and r.params["expert"] == 2 * params.blocks[-1].experts // 64
    assert not torch.distributed.is_initialized()
