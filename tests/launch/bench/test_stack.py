"""This software's own costs: found again where step times are made up of known ones, and the file that is written."""

import dataclasses

import pytest
from shoestring.conf.compose import load
from shoestring.launch.bench import stack
from shoestring.launch.simulate import project_step

LAYER, STEP = 400.0, 9000.0  # microseconds


def test_what_steps_were_made_of_is_found(monkeypatch):
    def made_up(ranks, job, config):
        ours = dataclasses.replace(config.stack, host_us_per_layer=LAYER, host_us_per_step=STEP)
        config = dataclasses.replace(config, stack=ours)
        return (project_step(config, terms=False).ideal,)

    monkeypatch.setattr(stack, "fork_ranks", made_up)
    found = stack.measure(load(["cluster=cpu"]).cluster)
    assert found.host_us_per_layer == pytest.approx(LAYER, rel=0.01) and found.host_us_per_step == pytest.approx(STEP, rel=0.01)
    assert found.terms and found.peer_wait == 0.0


def test_the_file_is_what_was_found(tmp_path):
    usual = load(["stack=shoestring"]).stack
    own = dataclasses.replace(usual, name="here", host_us_per_layer=12.5, host_us_per_step=800.0, peer_wait=0.0)
    path = stack.write(tmp_path / "stack" / "here.yaml", own)
    assert path.read_text().startswith(stack.MARK)
    assert load(["stack=here"], str(tmp_path)).stack == own


def test_a_real_step(monkeypatch):
    """Costs something, in each layer and beside them."""
    monkeypatch.setattr(stack, "STEPS", 5)
    endless = ["cluster.memory_tb_s=1e6", "cluster.rates.launch_us=0", *(f"cluster.peak_tflops.{p}=1e9" for p in ("fp32", "bf16"))]
    found = stack.measure(load(["cluster=cpu", *endless]).cluster)
    assert found.host_us_per_layer > 0
