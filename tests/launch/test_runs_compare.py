"""Two runs beside each other: settings that differ, losses at equal tokens by brute force, what the same loss cost, CSV and page."""

import csv
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load, to_yaml
from shoestring.conf.errors import ConfigError
from shoestring.launch import cli, exit_codes
from shoestring.launch.overview import compare
from shoestring.launch.overview.compare import Reached, Side
from shoestring.train import metrics
from shoestring.train.metrics import StepRecord


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=4096 * step, samples=16 * step, loss=8.0 / step, lr=1e-3, grad_norm=1.0, clip_coef=1.0, step_seconds=1.0,
        tokens_per_second=1000.0, tokens_per_second_per_gpu=250.0, seconds=1.5 * step, dollars=0.25 * step, dollars_per_billion_tokens=5.0,
        time_unix=1.8e9 + step,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def side(*records, **changed):
    return Side(path="x", settings=changed, records=list(records))


@pytest.fixture
def runs(tmp_path):
    """The first as long as twice the second, which has batches of twice the size and falls faster."""
    made = {
        "a": (["experiment=tiny"], [record(n) for n in range(1, 41)]),
        "b": (["experiment=tiny", "optim.lr=1e-2", "data.workers=3"], [record(n, tokens=8192 * n, loss=6.0 / n) for n in range(1, 31)]),
    }
    for name, (words, records) in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(to_yaml(load([*words, f"name={name}"])))
        (tmp_path / name / "metrics.jsonl").write_text("".join(map(metrics.to_line, records)))
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_what_is_printed(runs, capsys):
    assert cli.main(["runs", "compare", *runs]) == exit_codes.OK
    settings_, losses, costs = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in settings_.splitlines()[1:]}
    assert rows == {
        "name": ["a", "b"], "run_dir": ["runs/a", "runs/b"], "data.workers": [str(load(["experiment=tiny"]).data.workers), "3"],
        "optim.lr": ["0.003", "0.01"],
    }  # fmt: skip
    lines = losses.splitlines()[1:]
    assert len(lines) == compare.POINTS and "164 k" in lines[-1]  # 40 steps of 4096, which is 20 of 8192
    assert lines[-1].split()[-3:] == [f"{8 / 40:.4f}", f"{6 / 20:.4f}", f"{6 / 20 - 8 / 40:+.4f}"]
    # Medians of nine: 8/36 is the first's lowest and 6/26 the second's, which the first comes to at the median of 8/(n - 4).
    first = next(n for n in range(9, 41) if 8 / (n - 4) <= 6 / 26)
    assert [line.split()[3:5] for line in costs.splitlines()[1:]] == [[f"{6 / 26:.4f}", str(first)], [f"{6 / 26:.4f}", "30"]]
    assert f"${0.25 * first:.2f}" in costs and "$7.50" in costs


def test_settings_of_another_version_are_compared_as_they_stand():
    a = side(**compare.flat({"x": {"y": 1, "gone": [1]}, "same": 1.0, "off": False, "empty": {}}))
    b = side(**compare.flat({"x": {"y": 2}, "same": 1, "off": 0, "empty": {}, "new": None}))
    assert compare.differing(a, b) == [
        ("x.y", "1", "2"), ("x.gone", "[1]", compare.ABSENT), ("off", "False", "0"), ("new", compare.ABSENT, "None"),
    ]  # fmt: skip


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40, unique=True),
    st.lists(st.integers(1, 60), min_size=1, max_size=40, unique=True),
    st.integers(2, 12),
)
def test_pairs_are_the_nearest_records(left, right, points):
    a, b = (side(*(record(n, tokens=n) for n in sorted(tokens))) for tokens in (left, right))
    pairs = compare.at_equal_tokens(a, b, points)
    low, high = max(min(left), min(right)), min(max(left), max(right))
    shared = [n for n in sorted(left) if low <= n <= high]
    chosen = [x.tokens for x, _ in pairs]
    if shared:
        assert chosen == shared if len(shared) <= points else len(chosen) == points
        assert set(chosen) <= set(shared) and {shared[0], shared[-1]} <= set(chosen) and chosen == sorted(chosen)
    else:
        assert len(pairs) == 1
    for x, y in pairs:
        assert abs(x.tokens - y.tokens) == min(abs(x.tokens - n) for n in right)


def test_a_loss_is_reached_by_a_median_and_not_by_an_outlier():
    losses = [5.0, 4.0, 0.1, 4.0, math.nan, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0]
    found = side(*(record(n, loss=value) for n, value in enumerate(losses, 1)))
    # Three are a third of eleven numbers: the median of three is first at 3 in step 8, where two of them are.
    assert compare.reached(found, 3.0) == Reached(step=8, tokens=4096 * 8, dollars=2.0, seconds=12.0)
    assert compare.reached(found, 1.0) is None
    assert compare.target(found, side(record(1, loss=2.5))) == 2.5 and compare.target(found, side()) is None
    assert compare.target(found, side(record(1, loss=math.nan))) is None


def test_csv_joins_both_on_the_step(runs, tmp_path, capsys):
    assert cli.main(["runs", "compare", *runs, "--csv", "-"]) == exit_codes.OK
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    for n, row in enumerate(rows, 1):
        assert (float(row["loss_a"]), int(row["tokens_a"]), float(row["dollars_a"])) == (8.0 / n, 4096 * n, 0.25 * n)
        assert row["loss_b"] == (str(6.0 / n) if n <= 30 else "")


def test_the_page_has_both_curves_and_only_text_of_theirs(runs, tmp_path, capsys):
    bad = tmp_path / "</script><b>"[-3:]
    (tmp_path / "a" / "config.yaml").write_text("name: '<script>alert(1)</script>'\n")
    (tmp_path / "a").rename(bad)
    out = tmp_path / "page.html"
    assert cli.main(["runs", "compare", str(bad), runs[1], "--html", str(out)]) == exit_codes.OK
    text = out.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "http-equiv" in text and f"{bad} and" not in text
    figures = json.loads(text.split("const FIGURES = ")[1].split(";\n")[0])
    assert [figure["id"] for figure in figures] == ["loss-by-tokens", "loss-by-dollars"]
    by_tokens, by_dollars = ([trace for trace in figure["data"] if trace["mode"] == "lines"] for figure in figures)
    assert by_tokens[0]["x"] == [4096 * n for n in range(1, 41)] and by_dollars[1]["x"] == [0.25 * n for n in range(1, 31)]
    assert by_tokens[1]["y"] == by_dollars[1]["y"] == [6.0 / n for n in range(1, 31)]
    assert all("<" not in trace["name"] for trace in by_tokens)


def test_half_written_runs_are_compared_as_far_as_they_go(tmp_path, runs, capsys):
    for name, file, text in (("c", "config.yaml", "name: c\n"), ("d", "metrics.jsonl", metrics.to_line(record(1, loss=math.nan)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    c, d = str(tmp_path / "c"), str(tmp_path / "d")
    assert cli.main(["runs", "compare", c, d, "--html", str(tmp_path / "x.html")]) == exit_codes.OK
    out = capsys.readouterr().out
    assert f"{d}: its settings cannot be read" in out and f"{c}: no step has been recorded" in out
    assert cli.main(["runs", "compare", d, runs[1]]) == exit_codes.OK and "nan" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["a", "a b c", "a none", "a empty", "a b --sort loss", "a b --json"])
def test_what_is_no_comparison_is_refused(line, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", "compare", *line.split()]) == exit_codes.CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"RUN = .*none: no such folder"):
        compare.read(tmp_path / "none")
