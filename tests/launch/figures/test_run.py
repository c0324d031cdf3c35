"""A run's directory as it is followed: its account equals that of the whole directory, its events are all there, its charts show both."""

import dataclasses
import json
import math
import os

import pytest
from shoestring.conf.compose import load, to_yaml
from shoestring.launch.figures import facts, planned
from shoestring.launch.figures.make import AXES, make_charts
from shoestring.launch.figures.run import MOST_EVENTS, Run
from shoestring.launch.figures.speed import PUBLISHED_FLOPS, published
from shoestring.train import cost, metrics, sessions, waterfall
from shoestring.train.metrics import StepRecord
from shoestring.train.sessions import Began, Ended


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=4096 * step, samples=16 * step, loss=6.0 / step, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0,
        tokens_per_second=4096.0, tokens_per_second_per_gpu=1024.0, mfu=0.25, seconds=10 + 1.5 * step, dollars=2.0 * (10 + 1.5 * step),
        dollars_per_billion_tokens=5.0, batch_tokens=4096, time_unix=1.7e9 + step, data_seconds=0.125,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def began(session: int, seconds: float) -> Began:
    return Began(session=session, job="j", time_unix=1.7e9, seconds=seconds, devices=4, dollars=2.0)


def make(path, records=(), config=None, **more):
    path.mkdir(parents=True, exist_ok=True)
    config = config or load(["experiment=tiny", "train.steps=120", "train.global_batch_tokens=4096"])
    (path / "config.yaml").write_text(to_yaml(config))
    sessions.note(path, began(0, 0.0))
    (path / "metrics.jsonl").write_text("".join(map(metrics.to_line, records)))
    return path


def same(a, b) -> bool:
    return all(
        x.name == y.name and math.isclose(x.dollars, y.dollars, rel_tol=1e-9, abs_tol=1e-9) for x, y in zip(a.parts, b.parts, strict=True)
    )


def test_an_account_that_was_followed_is_that_of_the_whole(tmp_path):
    parts = {"compute": 0.5, "bubble": 0.25, "data": 0.125}
    path = make(tmp_path)
    run = Run(path)
    for step in range(1, 31):
        with open(path / "metrics.jsonl", "a") as file:
            file.write(metrics.to_line(record(step, breakdown=parts if step % 5 == 0 else None)))
        if step % 4 == 0:
            run.look()
    # A restart: steps 21 to 30 are taken back, and a new session goes on at step 21.
    metrics.rewind(path / "metrics.jsonl", 20)
    sessions.note(path, began(1, 70.0))
    for step in range(21, 26):
        with open(path / "metrics.jsonl", "a") as file:
            file.write(metrics.to_line(record(step, session=1, seconds=60 + 1.5 * step + 10)))
        run.look()
    sessions.note(path, Ended(session=1, seconds=120.0, standing=0.5, time_unix=1.7e9))
    run.look_at_all()
    whole = waterfall.waterfall(path)
    assert same(run.waterfall(), whole) and run.waterfall().dollars == pytest.approx(240.0)
    assert run.waterfall()["lost work"].dollars == pytest.approx(20.0) and whole.tokens == 25 * 4096
    assert [event.kind for event in run.events] == ["restart"] and run.events[0].at["step"] == 21


def test_everything_that_happened_is_told(tmp_path):
    records = [record(1), record(2, loss=math.nan), record(3, loss=math.nan), record(4), record(5, loss=math.inf),
               record(6, checkpoint="failed at step 5: no space left on <device>"), record(7, checkpoint="saved step 6"), record(8,
               session=2)]  # fmt: skip
    path = make(tmp_path, records)
    (path / "alerts.jsonl").write_text(
        json.dumps({"text": "the disk is full", "step": 6, "tokens": 5, "time_unix": 1.7e9}) + "\nrubbish\n[1]\n"
    )
    run = Run(path).look_at_all()
    assert [event.kind for event in run.events] == ["not a number", "not a number", "checkpoint", "restart", "alert"]
    assert "The loss was not a number at 3 step(s), the first at step 2." in facts.notes(run)
    rows = facts.happened([run])
    assert rows[0][2] == "started again (session 3), from step 8" and any("no space left on <device>" in what for *_, what in rows)
    shapes = next(chart for chart in make_charts([run], over="step") if chart.key == "loss").layout["shapes"]
    assert sorted(shape["x0"] for shape in shapes) == [2, 5, 6, 6, 8]


def test_events_are_bounded(tmp_path):
    path = make(tmp_path, [record(step, session=step) for step in range(1, 2 * MOST_EVENTS)])
    run = Run(path).look_at_all()
    assert len(run.events) <= MOST_EVENTS and run.events[-1].at["step"] == 2 * MOST_EVENTS - 1


@pytest.mark.parametrize("over", AXES)
def test_several_runs_are_side_by_side_on_every_axis(tmp_path, over):
    runs = [
        Run(make(tmp_path / name, [record(s, loss=i + s / 10) for s in range(1, 9)]), label=f"<b>{name}</b>").look_at_all()
        for i, name in enumerate("abc")
    ]
    charts = {chart.key: chart for chart in make_charts(runs, over=over)}
    lines = [trace for trace in charts["loss"].data if trace["mode"] == "lines"]
    assert [trace["y"] for trace in lines] == [[i + s / 10 for s in range(1, 9)] for i in range(3)]
    assert [trace["name"] for trace in lines] == [f"&lt;b&gt;{name}&lt;/b&gt;" for name in "abc"]
    assert len({trace["line"]["color"] for trace in lines}) == 3
    wanted = {"step": range(1, 9), "tokens": range(4096, 9 * 4096, 4096), "seconds": [(10 + 1.5 * s) / 60 for s in range(1, 9)],
              "dollars": [2.0 * (10 + 1.5 * s) for s in range(1, 9)]}[over]  # fmt: skip
    assert lines[0]["x"] == list(wanted)
    assert charts["waterfall"].data[0]["type"] == "bar" and len(charts["waterfall"].data[0]["x"]) == 3


def test_bars_of_the_waterfall_stand_on_each_other(tmp_path):
    path = make(tmp_path, [record(s, eval_seconds=0.25) for s in range(1, 9)])
    run = Run(path).look_at_all()
    (bars,) = next(chart for chart in make_charts([run]) if chart.key == "waterfall").data
    *parts, whole = bars["y"]
    assert whole == pytest.approx(sum(parts)) == pytest.approx(run.waterfall().dollars) == pytest.approx(44.0)
    assert bars["base"] == pytest.approx([sum(parts[:i]) for i in range(len(parts))] + [0.0])


def test_what_is_to_come_is_named_projected(tmp_path):
    config = load(["experiment=tiny", "train.steps=120", "train.global_batch_tokens=4096", "budget_usd=1000"])
    run = Run(make(tmp_path, [record(s, batch_tokens=4096) for s in range(1, 41)], config)).look_at_all()
    chart = next(chart for chart in make_charts([run]) if chart.key == "dollars")
    ahead = [trace for trace in chart.data if trace["name"].startswith("projected")]
    assert len(ahead) == 3 and ahead[1]["y"][0] == 2.0 * (10 + 60) and "projected" in chart.subtitle
    assert any(note["text"] == "budget $1,000" for note in chart.layout["annotations"])
    tile = facts.tiles(run)[-1]
    # 80 steps at a second each and what came beside: of 70 s, 10.5 before the first step, 40 in steps, 19.5 between them.
    assert tile.label == "To go" and tile.note.startswith("projected") and tile.value == "1:59"


def test_the_published_speed_is_at_equal_flops():
    v3 = load(["experiment=deepseek_v3", "data=synthetic"])
    assert cost.flops_per_token(v3.model, 4096).total == pytest.approx(PUBLISHED_FLOPS, rel=1e-3)
    run = Run.__new__(Run)
    run.config = v3
    assert published(run) == pytest.approx(1540, rel=1e-3)


def test_planned_beside_measured(tmp_path):
    config = load(["experiment=tiny", "cluster=h100", "precision=bf16"])
    plan = planned.plan(config)
    run = Run(make(tmp_path, [record(s, memory_gb=55.0) for s in range(1, 5)], config)).look_at_all()
    rows = {row[0]: row[1:] for row in planned.table(run, plan)}
    assert rows["Memory, fullest rank"][1] == "55.0 GB" and rows["Tokens/s/GPU"][1] == "1.02 k" and rows["Step time"][1] == "1.00 s"
    charts = {chart.key: chart for chart in make_charts([run], planned=plan)}
    stacked = [bar for bar in charts["memory"].data if bar["y"] == ["projected"]]
    assert sum(bar["x"][0] for bar in stacked) == pytest.approx(plan.memory.total / 1e9)
    assert planned.plan(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, memory_tb_s=0.0))) is None


HOSTILE = [None, True, "9", "<b>", [1], {"a": 1}, -5, 0, 1e308, 10**400]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_a_hostile_value_in_any_field_leaves_a_page(tmp_path, value):
    """Lines that no run writes, among some that it does."""
    lines = [metrics.to_line(record(1))]
    plain = metrics.to_plain(record(2, max_vio=[0.5], expert_load=[[1, 2]], eval_loss_by_source={"a": 1.0}, breakdown={"compute": 1.0}))
    for name in plain:
        lines.append(json.dumps(plain | {name: value}) + "\n")
        lines.append(json.dumps(plain | {name: [value, [value]]}) + "\n")
    lines.append(metrics.to_line(record(3)))
    path = make(tmp_path)
    (path / "metrics.jsonl").write_text("".join(lines))
    run = Run(path).look_at_all()
    for over in AXES:
        charts = make_charts([run], over=over)
        json.dumps([[chart.data, chart.layout] for chart in charts], allow_nan=False)
    assert facts.tiles(run) and facts.status(run) and facts.happened([run]) is not None and run.last["step"] == 3


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "ending.json",
        "lease.json",
        "alerts.jsonl",
        "sessions.jsonl",
        metrics.LOST,
        "traces",
    ):
        os.mkfifo(tmp_path / name)
    run = Run(tmp_path).look_at_all()
    assert not run.last and "There is no config.yaml" in facts.notes(run)[0]
