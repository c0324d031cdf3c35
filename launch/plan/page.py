"""A plan as one HTML file: what it costs, where a step's time goes, what fits, other plans beside it, and the best step rank by rank."""

import html
from collections.abc import Sequence

from ...conf.compose import to_yaml
from ...parallel.timeline import Span as Ran
from ...parallel.trace import Span
from ...train import cost, units
from ..figures.chart import Chart
from ..figures.gantt import gantt
from ..figures.page import Page, Tile, render
from . import table
from .plans import Plan

_METHOD = (
    "Nothing here was measured. It is projected: a step of every pipeline rank is simulated, with the lists of actions that training runs.",
    "Kernels and links take what conf/cluster/ says that such devices reach; each value there has its source.",
    "Expected is ideal plus named terms, each with an interval; squares of intervals add. No value was fitted to a run's total.",
    "MFU counts what the mathematics needs, recomputation not; of the dense peak in the precision of the products.",
)
STYLE = """
.scroll { overflow-x: auto; }
table.plans { width: 100%; border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
table.plans td, table.plans th { padding: 5px 8px; border-top: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
table.plans td:last-child, table.plans th:last-child { text-align: left; white-space: normal; min-width: 16em; }
table.plans th { border: 0; color: var(--soft); font-weight: 560; }
"""


def page(plans: Sequence[Plan], notes: Sequence[str], command: str) -> str:
    """`plans`: the best first."""
    best = plans[0]
    c, run = best.config, best.run
    return render(
        Page(
            title=f"{c.model.name} on {run.gpus:,} x {c.cluster.device}",
            kind="plan",
            status="projected",
            facts=[f"{units.count(cost.num_params(c.model).total)} parameters", f"{units.count(run.tokens)} tokens", c.precision.products,
                   str(best.layout)],
            notes=list(notes),
            notes_title="Beside it",
            tiles=_tiles(best),
            charts=[_breakdown(plans), _memory(best), *[_terms(best)] * bool(best.step.terms), _gantt(best)],
            sections=[_table(plans)],
            config_text=f"{command}\n\n{to_yaml(c)}",
            method=list(_METHOD),
        )
    )  # fmt: skip


def _tiles(plan: Plan) -> list[Tile]:
    run, step, c = plan.run, plan.step, plan.config
    between = lambda interval, form: f"{form(interval.low)} to {form(interval.high)}"
    speed = lambda value: f"{value:,.0f}"
    thousand = lambda value: f"{value / 1e3:,.4g} K"
    hours = run.gpu_hours_per_trillion_tokens
    return [
        Tile("Dollars", units.money(run.dollars.likely), between(run.dollars, units.money)),
        Tile("Time", table.days(run.days.likely), between(run.days, table.days)),
        Tile("Tokens/s/GPU", speed(run.tokens_per_second_per_gpu.likely), between(run.tokens_per_second_per_gpu, speed)),
        Tile("GPU-hours per trillion tokens", thousand(hours.likely), between(hours, thousand)),
        Tile("Step", f"{step.expected.likely:.3g} s", f"ideal {step.ideal:.3g} s"),
        Tile(
            "MFU", units.percent(run.mfu.likely) if run.mfu else "–", f"of {c.cluster.peak_tflops.get(c.precision.products, 0):g} TFLOP/s"
        ),
        Tile("Memory", f"{plan.memory_gb[1.0]:.1f} GB", f"of {c.cluster.memory_gb:g}, the fullest rank"),
        Tile("Energy", f"{units.count(run.kwh.likely)} kWh", f"{c.cluster.kw_per_gpu:g} kW a GPU"),
    ]


def _breakdown(plans: Sequence[Plan]) -> Chart:
    """A bar for each plan; parts that are nothing are left out."""
    names = [f"plan {i}" for i in range(1, len(plans) + 1)]
    parts = [part for part in plans[0].step.breakdown if any(plan.step.breakdown.get(part, 0) > 0 for plan in plans)]
    data = [
        {"type": "bar", "orientation": "h", "name": part.replace("_", " "), "y": names[::-1],
         "x": [round(plan.step.breakdown.get(part, 0.0), 4) for plan in plans][::-1], "marker": {"color": f"@series{i % 8}"},
         "hovertemplate": f"{part.replace('_', ' ')}: %{{x:.3g}} s<extra></extra>"}
        for i, part in enumerate(parts)
    ]  # fmt: skip
    layout = {"barmode": "stack", "showlegend": True, "xaxis": {"title": {"text": "seconds of a step"}}, "yaxis": {"showgrid": False}}
    return Chart("breakdown", "Where a step's time goes", "Expected: the ideal step's parts, then the terms beside it", data, layout,
                 wide=True, height=150 + 34 * len(plans))  # fmt: skip


def _memory(plan: Plan) -> Chart:
    imbalances = [f"imbalance {imbalance:g}" for imbalance in plan.memory_gb]
    capacity = plan.config.cluster.memory_gb
    data = [
        {"type": "bar", "x": imbalances, "y": [round(gb, 1) for gb in plan.memory_gb.values()], "marker": {"color": "@blue"},
         "hovertemplate": "%{y:.1f} GB<extra></extra>"},
        {"type": "scatter", "mode": "lines", "x": imbalances, "y": [capacity] * len(imbalances),
         "line": {"color": "@orange", "dash": "dash"},
         "hovertemplate": f"{capacity:g} GB there are<extra></extra>"},
    ]  # fmt: skip
    subtitle = f"GB of the fullest rank, and of the device (the line). The peak is {plan.peak_at}"
    return Chart("memory", "Memory", subtitle, data, {"xaxis": {}, "yaxis": {"rangemode": "tozero"}})


def _terms(plan: Plan) -> Chart:
    terms = dict(reversed(plan.step.terms.items()))
    ends = lambda of: [round(of(t), 4) for t in terms.values()]
    likely = ends(lambda t: t.likely)
    data = [
        {"type": "scatter", "mode": "markers", "x": likely, "y": [name.replace("_", " ") for name in terms], "marker": {"color": "@blue"},
         "error_x": {"type": "data", "symmetric": False, "array": ends(lambda t: t.high - t.likely), "color": "@blue",
                     "arrayminus": ends(lambda t: t.likely - t.low)},
         "hovertemplate": "%{y}: %{x:+.3g} s<extra></extra>"},
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "seconds of a step"}}, "yaxis": {}}
    return Chart("terms", "What an ideal step leaves out", "What each term adds, likely and from low to high", data, layout)


def _gantt(plan: Plan) -> Chart:
    spans = [span for rank, of_rank in enumerate(plan.step.timeline.spans) for s in of_rank for span in _spans(rank, s)]
    chart = gantt(spans, {}, file="")
    subtitle = "The best plan's ideal step, a row for each pipeline rank; an overlapped pair is drawn as backward, then forward"
    return Chart("gantt", "The step, rank by rank", subtitle, chart.data, chart.layout, wide=True, height=chart.height)


def _spans(rank: int, span: Ran) -> list[Span]:
    ops = span.action[::-1]
    part = (span.end - span.start) / len(ops)
    at = lambda i: span.start + i * part
    return [Span(rank, "compute", op.kind, op.stage, op.micro_batch, "", at(i), at(i + 1)) for i, op in enumerate(ops)]


def _table(plans: Sequence[Plan]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in table.row(plan)) + "</tr>" for plan in plans)
    body = f'<div class="scroll"><table class="plans"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    details = "".join(f"<li>{html.escape(line.strip())}</li>" for line in table.details(plans[0]))
    words = f"<details><summary>The best in words</summary><ul>{details}</ul></details>"
    return f'<style>{STYLE}</style><section class="card wide"><h2>Plans</h2>{body}{words}</section>'
