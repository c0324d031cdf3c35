"""The picture of a traced step: what each rank computed and exchanged, and when.

A row per rank: compute above, exchanges below it, forward over backward. Bars of one colour are one path, so that tens of thousands of
them can be drawn; what a bar is, is told on hovering where there are few enough.
"""

from collections.abc import Sequence
from pathlib import Path

from ...parallel.trace import PIPELINE, Span, read_trace
from ...train import units
from .chart import Chart

MAX_RANKS = 16  # rows that can be told apart; of a larger job, the first
MAX_HOVERS = 6000
MIN_SHARE = 1e-4  # of the step: what is shorter cannot be seen, and joins its neighbour
KINDS = {"F": ("forward", "@blue"), "B": ("backward", "@orange"), "W": ("weight gradients", "@green"), "X": ("exchange", "@purple")}


def make_gantt(folder: Path, notes: list[str], step: int | None = None) -> Chart | None:
    """Of a traced step under `folder`, the last where none is named; None where there is none. A file that cannot be read is told in
    `notes`."""
    traced = sorted(folder.glob("step_*.json"), key=lambda path: (len(path.name), path.name))
    traced = [path for path in traced if path.name == f"step_{step}.json"] or traced
    if not traced:
        return None
    try:
        spans, facts = read_trace(traced[-1])
        return gantt(spans, facts, file=f"{folder.name}/{traced[-1].name}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        notes.append(f"{folder.name}/{traced[-1].name} cannot be drawn ({str(error)[:200]}).")
        return None


def gantt(spans: Sequence[Span], facts: dict, *, file: str) -> Chart:
    """`facts`: what `write_trace` was given: the step and its measures."""
    spans = [s for s in spans if s.what in PIPELINE]
    all_ranks = sorted({s.rank for s in spans})
    ranks = all_ranks[:MAX_RANKS]
    row_of = {rank: row for row, rank in enumerate(ranks)}
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    drawn = [s for s in spans if s.rank in row_of and s.what in ("compute", "exchange")]
    data = []
    for kind, (name, colour) in KINDS.items():
        bars = [s for s in drawn if _kind(s) == kind]
        x, y = [], []
        for row, (bottom, top), times in _lanes(bars, row_of, MIN_SHARE * (last - first)):
            for start, end in times:
                left, right = round((start - first) * 1e3, 3), round((end - first) * 1e3, 3)
                x += [left, right, right, left, left, None]
                y += [row + bottom, row + bottom, row + top, row + top, row + bottom, None]
        if x:
            data.append({"type": "scatter", "mode": "none", "name": name, "x": x, "y": y, "fill": "toself", "fillcolor": colour,
                         "hoverinfo": "skip"})  # fmt: skip
    if len(drawn) <= MAX_HOVERS:
        data.append(_hovers(drawn, row_of, first))
    layout = {
        "xaxis": {"title": {"text": "milliseconds"}, "range": [0, (last - first) * 1e3], "showgrid": False},
        "yaxis": {"range": [len(ranks), 0], "tickvals": [row + 0.5 for row in range(len(ranks))], "ticktext": [f"rank {r} " for r in ranks],
                  "showgrid": False, "fixedrange": True},
        "showlegend": True,
    }  # fmt: skip
    subtitle = _subtitle(facts, file, len(ranks), len(all_ranks))
    return Chart(
        "gantt",
        "Where a step's time goes",
        subtitle,
        data,
        layout,
        wide=True,
        section="Speed",
        height=130 + max(26, min(70, 520 // len(ranks))) * len(ranks),
    )


def _kind(s: Span) -> str:
    return "X" if s.what == "exchange" else "B" if s.kind == "I" else s.kind


def _place(s: Span) -> tuple[float, float]:
    """From and to, within a row that is one high and points down."""
    if s.what == "compute":
        return 0.08, 0.58
    return (0.61, 0.73) if s.kind == "F" else (0.76, 0.88)


def _lanes(bars: Sequence[Span], row_of: dict[int, int], least: float):
    """(row, place, times) of each lane; times closer than `least` are one."""
    lanes: dict[tuple, list[list[float]]] = {}
    for s in sorted(bars, key=lambda s: s.start):
        times = lanes.setdefault((row_of[s.rank], _place(s)), [])
        if times and s.start - times[-1][1] < least:
            times[-1][1] = max(times[-1][1], s.end)
        else:
            times.append([s.start, s.end])
    return [(row, place, times) for (row, place), times in lanes.items()]


def _hovers(bars: Sequence[Span], row_of: dict[int, int], first: float) -> dict:
    """Unseen points in the middle of the bars."""
    told = [
        [
            f"rank {s.rank}: {KINDS[_kind(s)][0]} of stage {s.stage}, micro-batch {s.micro_batch}",
            s.phase,
            f"{units.significant(1e3 * (s.end - s.start))} ms",
        ]
        for s in bars
    ]
    return {
        "type": "scatter", "mode": "markers", "showlegend": False, "marker": {"size": 9, "opacity": 0}, "customdata": told,
        "x": [round((s.start + s.end) / 2 * 1e3 - first * 1e3, 3) for s in bars],
        "y": [row_of[s.rank] + sum(_place(s)) / 2 for s in bars],
        "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]}<extra></extra>",
    }  # fmt: skip


def _subtitle(facts: dict, file: str, shown: int, total: int) -> str:
    parts = [f"step {facts['step']:,}"] if "step" in facts else []
    if facts.get("bubble") is not None:
        parts.append(f"bubble {units.percent(facts['bubble'])}")
    if facts.get("hidden_share") is not None:
        inside = facts.get("pair_hidden_share")
        pairs = f" ({units.percent(inside)} inside overlapped pairs)" if inside is not None else ""
        parts.append(f"{units.percent(facts['hidden_share'])} of exchange time under compute{pairs}")
    if shown < total:
        parts.append(f"{shown} of {total:,} ranks")
    return " · ".join([*parts, f"drag to zoom; {file} opens in ui.perfetto.dev"])
