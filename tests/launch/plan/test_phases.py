"""A run of several phases: each priced by itself, and their sum."""

import json

import pytest
from shoestring.conf.compose import load
from shoestring.conf.phases import phases
from shoestring.conf.rules import replaced
from shoestring.launch import exit_codes
from shoestring.launch.plan.command import main
from shoestring.launch.plan.phases import price_phases
from shoestring.launch.plan.plans import launch_words
from shoestring.launch.plan.request import BATCH
from shoestring.launch.simulate import project_run, project_step
from shoestring.launch.validate import validate

TINY = ["experiment=tiny_recipe", "cluster=h100", "data=synthetic"]


@pytest.fixture(scope="module")
def tiny():
    run = load(TINY)
    return run, price_phases(run.phases, adapt=False)


def test_phases_are_the_run_s(tiny):
    run, made = tiny
    for phase, plan in zip(phases(run), made, strict=True):
        assert (plan.name, plan.num_steps, plan.run.tokens) == (phase.name, phase.num_steps, phase.num_tokens)
        assert plan.config == phase.config and not plan.words and not plan.notes
        alone = project_step(phase.config)
        assert plan.step.ideal == alone.ideal and plan.step.tokens == phase.config.train.global_batch_tokens
        if len(phase.levels) == 1:
            one = project_run(phase.config, alone, phase.num_tokens)
            assert plan.run.dollars.likely == pytest.approx(one.dollars.likely) and plan.run.days.high == pytest.approx(one.days.high)


def test_a_growing_batch_is_its_steps(tiny):
    """Every size simulated, one by one, against three and lines between them."""
    run, made = tiny
    ramp, config = phases(run)[0], run.phases["ramp"]
    assert len(ramp.levels) > 4
    steps = {level.batch_tokens: project_step(replaced(config, BATCH, level.batch_tokens)).expected for level in ramp.levels}
    for end in ("low", "likely", "high"):
        total = sum(level.num_steps * getattr(steps[level.batch_tokens], end) for level in ramp.levels)
        found = getattr(made[0].run.gpu_hours, end) * 3600 / 4 * made[0].run.effective
        assert found == pytest.approx(total, rel=0.01)
    full = project_run(config, made[0].step, ramp.num_tokens)
    assert made[0].run.dollars.likely > 1.05 * full.dollars.likely  # small batches are dear


def test_a_plan_is_the_sum_of_its_phases(capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert main([*TINY, "search=false", f"output={out}"], None) == exit_codes.OK
    text = capsys.readouterr().out
    (plan,) = json.loads(out.read_text())["plans"]
    run = load(TINY)
    assert [p["name"] for p in plan["phases"]] == list(run.phases) and plan["main_phase"] == "constant"
    for whole, part in (("dollars_total", "dollars"), ("days", "days"), ("tokens", "tokens"), ("gpu_hours_total", "gpu_hours")):
        assert plan[whole] == pytest.approx(sum(p[part] for p in plan["phases"])), whole
    constant = plan["phases"][1]
    assert plan["step_seconds"] == constant["step_seconds"] == pytest.approx(project_step(run.phases["constant"]).expected.likely)
    rows = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in run.phases]
    assert len(rows) == len(run.phases) and "of phase constant" in text
    assert [p["seq_len"] for p in plan["phases"]][-2:] == [512, 2048] and plan["phases"][-1]["layout"].startswith("pp 4")


def test_tokens_are_the_main_phase_s(capsys, tmp_path):
    out = tmp_path / "plan.json"
    main([*TINY, "search=false", "tokens=1e9", f"output={out}"], None)
    (plan,) = json.loads(out.read_text())["plans"]
    assert plan["phases"] == [] and plan["tokens"] == 1e9 and "all of them as in phase constant" in capsys.readouterr().out


def test_one_phase_has_no_rows(capsys, tmp_path):
    out = tmp_path / "plan.json"
    words = ["model=tiny", "cluster=h100", "gpus=4", "data.seq_len=64", "train.global_batch_tokens=16384", "tokens=1e9", "top=1"]
    assert main([*words, f"output={out}"], None) == exit_codes.OK
    (plan,) = json.loads(out.read_text())["plans"]
    assert plan["phases"] == [] and "of phase" not in capsys.readouterr().out
    assert load([*launch_words([f"plan={out}"]), "data=synthetic"]).train.tokens == 1_000_000_000


def test_a_phase_that_its_schedule_cannot_run(capsys, tmp_path):
    """DualPipe wants an even number of micro-batches, at least four on two ranks: the ramp begins with two. What is written runs."""
    out = tmp_path / "plan.json"
    main([*TINY, "parallel.schedule=dualpipe", "search=false", f"output={out}"], None)
    assert "phase ramp: parallel.schedule = dualpipe" in capsys.readouterr().out
    layouts = {p["name"]: p["layout"] for p in json.loads(out.read_text())["plans"][0]["phases"]}
    assert "1f1b" in layouts["ramp"] and "dualpipe" in layouts["constant"]
    launched = load(launch_words([f"plan={out}"]))
    validate(launched)
    assert launched.phases["ramp"].parallel.schedule == "1f1b" and launched.phases["constant"].parallel.schedule == "dualpipe"


def test_a_phase_that_needs_less_memory():
    """Where a layout is searched, a phase that does not fit recomputes; where it is given, it is priced as it is, and that is said."""
    run = load([*TINY, "cluster.memory_gb=0.15"])
    long = {"extend_32x": run.phases["extend_32x"]}
    (given,), (adapted,) = price_phases(long, adapt=False), price_phases(long, adapt=True)
    assert given.config == run.phases["extend_32x"] and any("does not fit" in note for note in given.notes)
    assert adapted.config.train.recompute == ("attention", "experts") and adapted.memory_gb < given.memory_gb
    assert adapted.words == ("phases.extend_32x.train.recompute=[attention,experts]",)
