"""The bench as a page: what a kernel does beside its ceiling and its peers, every row as a table, and of training the loss curves."""

import html

from ...train import units
from ..figures.chart import Chart
from ..figures.page import Page, Tile, render
from . import table
from .results import Results, Row, aims
from .step import SLOW, Steps

METHOD = [
    "Times are medians of device events around single calls, on inputs that change from call to call and together exceed the L2 cache "
    "four times over; calls wait in the device's queue, so that no time of Python is in them.",
    "dB is the signal-to-noise ratio against FP64 (FP32 for the head) of the same operands; of casts, of the numbers that were cast.",
    "Ceilings are those of this run: a copy of 1 GiB, and products of 8192 x 8192 matrices in BF16 and in FP8 (row-wise, by torch).",
    "A ratio above 1 means that Shoestring was faster. DeepGEMM's rates are as published, on an H800, and were not measured here.",
    "FLOPs are those that the mathematics needs; bytes are what an op reads and writes, each once.",
]


SYMBOLS = ("circle", "diamond")  # once the colours are used up


def page(results: Results) -> str:
    """HTML, of one file."""
    found = list(aims(results))
    tiles = [Tile(label=a.what, value=units.significant(a.value), note=f"aim: {units.significant(a.least)}") for a in found]
    notes = [f"{row.op}, {row.shape}: {row.error}" for row in results.rows if row.error]
    if not results.timed:
        notes.insert(0, "There is no GPU here: only correctness was checked, at small sizes, and nothing was timed.")
    facts = [results.device, results.date, ", ".join(f"{name} {version}" for name, version in results.versions.items())]
    facts += [f"commit {results.commit[:12]}"] if results.commit else []
    charts = [chart for chart in (_shares(results), _ratios(results)) if chart.data]
    return render(
        Page(
            title="Kernels",
            facts=facts,
            status="all right" if results.passed else "something is wrong",
            notes=notes,
            tiles=tiles,
            charts=charts,
            config_text=results.command,
            method=METHOD,
            sections=[_rows(results)],
            kind="bench",
        )
    )


def _name(row: Row) -> str:
    return f"{row.op} {row.shape}"


def _by_row(results: Results, key: str, title: str, subtitle: str, traces: list[dict], line: float, suffix: str = "") -> Chart:
    shown = {name for trace in traces for name in trace["y"]}
    names = [name for name in map(_name, results.rows) if name in shown]
    shapes = [
        {"type": "line", "x0": line, "x1": line, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "@muted", "width": 1, "dash": "dash"}}
    ]
    layout = {
        "barmode": "overlay", "showlegend": len(traces) > 1, "shapes": shapes, "xaxis": {"rangemode": "tozero", "ticksuffix": suffix},
        "yaxis": {"autorange": "reversed", "categoryorder": "array", "categoryarray": names, "tickfont": {"size": 11}, "dtick": 1},
    }  # fmt: skip
    return Chart(key, title, subtitle, traces, layout, wide=True, height=150 + 22 * len(names))


def _shares(results: Results) -> Chart:
    traces = []
    for i, name in enumerate(("fp8", "bf16", "copy")):
        rows = [row for row in results.rows if row.ceiling == name and results.share(row) is not None]
        if rows:
            shares, told = [100 * results.share(row) for row in rows], [[table.rate(row), table.time(row.seconds)] for row in rows]
            traces.append({
                "type": "bar", "orientation": "h", "name": name, "x": shares, "y": [_name(row) for row in rows], "customdata": told,
                "marker": {"color": f"@series{i}"},
                "hovertemplate": "%{y}<br>%{x:.1f} %, %{customdata[0]}, %{customdata[1]}<extra></extra>",
            })  # fmt: skip
    return _by_row(
        results, "shares", "Share of the ceiling", "of a large product in FP8 or BF16, or of a large copy, in this run", traces, 100, " %"
    )


def _ratios(results: Results) -> Chart:
    names = list(dict.fromkeys(peer.name for row in results.rows for peer in row.peers))
    traces = []
    for i, name in enumerate(names):
        rows = [row for row in results.rows if row.ratio(name) is not None]
        if rows:
            traces.append({
                "type": "scatter", "mode": "markers", "name": name, "x": [row.ratio(name) for row in rows],
                "y": [_name(row) for row in rows], "marker": {"color": f"@series{i % 8}", "size": 9, "symbol": SYMBOLS[i // 8 % 2]},
                "hovertemplate": "%{y}<br>%{x:.2f} times as fast<extra>" + name + "</extra>",
            })  # fmt: skip
    return _by_row(results, "ratios", "Beside others", "how many times as fast as each, in this run; dashed: as fast", traces, 1)


def _rows(results: Results) -> str:
    e, cells = html.escape, []
    for row in results.rows:
        db = "equal" if row.db is None and row.passed and not row.error else "" if row.db is None else f"{row.db:.1f}"
        others = "; ".join(f"{p.name} {p.why}" if p.why else f"{row.ratio(p.name):.2f} x {p.name}" for p in row.peers if p.why or p.seconds)
        told = [row.op, row.shape, db, table.time(row.seconds), table.rate(row), table.percent(results.share(row)), others]
        cells.append("<tr>" + "".join(f"<td>{e(text)}</td>" for text in told) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("op", "shape", "dB", "time", "rate", "of ceiling", "beside"))
    table_html = f"<table><tr>{heads}</tr>{''.join(cells)}</table>"
    return f'<section class="card wide"><h2>Every row</h2><div style="overflow-x:auto">{table_html}</div></section>'


# ---------------------------------------------------------------- training


def step_page(steps: Steps) -> str:
    """Of `shoestring bench step`."""
    tiles = [tile for run in steps.runs for tile in (
        Tile(label=f"{run.precision}: tokens per second", value=units.count(run.tokens_per_second), note=f"MFU {units.percent(run.mfu)}"),
        Tile(label=f"{run.precision}: peak memory", value=f"{units.significant(run.memory_gb)} GB" if run.memory_gb else "not known",
             note=f"state by the cost model {units.significant(run.state_gb)} GB"),
    )]  # fmt: skip
    if steps.ratio:
        tiles.append(Tile(label="fp8 over bf16", value=units.significant(steps.ratio), note="tokens per second"))
    lines = [
        {"type": "scatter", "mode": "lines", "name": run.precision, "x": list(range(1, len(run.losses) + 1)), "y": run.losses,
         "line": {"color": f"@series{i}"}, "hovertemplate": run.precision + " step %{x}: %{y:.4f}<extra></extra>"}
        for i, run in enumerate(steps.runs) if run.losses
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "nats per token"}}, "showlegend": True}
    charts = [Chart("loss", "Loss", "training text, the same batches", lines, layout, wide=True, height=340)] if lines else []
    method = [
        f"Speed is the median of the steps after the first {SLOW}; memory is the peak of the run.",
        "State is what train/cost.py has for weights, gradients and optimizer; activations and buffers are not in it.",
    ]
    notes = [f"{run.precision}: {run.error}" for run in steps.runs if run.error]
    return render(
        Page(
            title="A training step",
            facts=[steps.device, steps.date, f"{units.count(steps.parameters)} parameters"],
            status="something is wrong" if notes else "done",
            notes=notes,
            tiles=tiles,
            charts=charts,
            config_text="\n".join(steps.words),
            method=method,
            kind="bench",
        )
    )
