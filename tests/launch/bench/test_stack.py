"""This software's own costs: found again where steps are made up of known ones, in real steps, and in the file that is written."""

import dataclasses

import pytest
from shoestring.conf.compose import load
from shoestring.conf.schema import PhaseConfig
from shoestring.launch.bench import stack
from shoestring.launch.local import fork_ranks
from shoestring.launch.simulate import project_step
from shoestring.launch.simulate.stage import Compute, Exchange

LINES = {
    f"{phase}_{when}": PhaseConfig(host_us=100.0 * i + 10 * j, times=round(1 + 0.1 * i + 0.3 * j, 3))
    for i, phase in enumerate(("attention", "experts", "mlp", "head"))
    for j, when in enumerate("FBW")
} | {
    "embed_F": PhaseConfig(host_us=7.0, times=2.0),
    "embed_W": PhaseConfig(host_us=70.0, times=1.5),
    "exchange": PhaseConfig(host_us=900, times=3),
}
STEP = 9000.0  # microseconds


def test_what_steps_were_made_of_is_found(monkeypatch):
    def made_up(ranks, job, configs):
        """Every rank of a model alike: its kernels and links on the lines."""
        found = []
        for config in configs:
            config = dataclasses.replace(config, stack=dataclasses.replace(config.stack, phases=LINES, host_us_per_step=STEP))
            steps = stack._steps_of(config)
            phases = {f"{s.name}_{w}": s.alone[w].seconds for s in steps if isinstance(s, Compute) for w in "FBW" if s.alone[w].seconds}
            exchanges = [s.alone["F"] for s in steps if isinstance(s, Exchange) and s.alone]
            forward = sum(s.alone["F"].seconds for s in steps if isinstance(s, Compute)) + sum(exchanges)
            found.append({**phases, "forward": forward, "step": project_step(config, terms=False).ideal})
        return [found] * ranks

    monkeypatch.setattr(stack, "fork_ranks", made_up)
    found, (note,) = stack.measure(load(["cluster=cpu"]).cluster, 2)
    assert found.phases.keys() == LINES.keys() and found.peer_wait == 0.0 and found.terms
    for name, line in LINES.items():
        assert found.phases[name].host_us == pytest.approx(line.host_us, rel=0.01, abs=0.1), name
        assert found.phases[name].times == pytest.approx(line.times, rel=0.01), name
    assert found.host_us_per_step == pytest.approx(STEP, rel=0.02)
    assert "attention_F 0 %" in note


def test_the_file_is_what_was_found(tmp_path):
    usual = load(["stack=shoestring"]).stack
    own = dataclasses.replace(usual, name="here", phases=LINES, host_us_per_step=800.0, peer_wait=0.0)
    path = stack.write(tmp_path / "stack" / "here.yaml", own, ["four models", "on two processes"])
    assert path.read_text().startswith(f"{stack.MARK}: four models on two processes\n")
    assert load(["stack=here"], str(tmp_path)).stack == own


def test_real_steps(monkeypatch):
    """Phases of forward are most of what it takes; those of all passes are most of a step."""
    monkeypatch.setattr(stack, "STEPS", 4)
    for ep in (1, 2):
        config = load([*stack._words(32, 2, 1, 32, 16, 32, 512, 2), f"parallel.ep={ep}", f"parallel.edp={2 // ep}"])
        for (measured,) in fork_ranks(2, stack._train, [config]):
            assert set(measured) == {*LINES, "embed_B", "forward", "step"} - {"exchange"} and all(
                seconds > 0 for seconds in measured.values()
            )
            num = {"attention": 4, "experts": 3, "mlp": 1, "embed": 1, "head": 1}
            one = {name: seconds * num[name.split("_")[0]] for name, seconds in measured.items() if name not in ("forward", "step")}
            forward = sum(seconds for name, seconds in one.items() if name.endswith("_F"))
            assert 0.3 * measured["forward"] < forward < 1.2 * measured["forward"]  # medians of different steps, and exchanges
            assert 0.2 * measured["step"] < config.num_micro_batches * sum(one.values()) < 1.2 * measured["step"]
