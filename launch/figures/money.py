"""Charts of what a run costs: where each dollar went, what is spent and what is left to spend, and the price of a token."""

from collections.abc import Sequence

from ...train import units
from .chart import SERIES, Chart, level, style, text, word
from .curves import Axis, axis, curves, line, marks, xaxis
from .run import Run

SECTION = "Money"
# Those that train, those that are the price of parallelism, those of keeping on, those of nothing: a colour for each kind.
COLORS = {
    "compute": "@green", "steps, not divided": "@green", "recompute": "@yellow", "exposed all-to-all": "@orange",
    "bubble": "@orange", "imbalance": "@orange",
    "update": "@blue", "data": "@purple", "evaluation": "@blue", "checkpoint": "@purple", "start": "@purple", "restart": "@red",
    "lost work": "@red", "idle": "@muted",
}  # fmt: skip


def charts(runs: Sequence[Run], over: Axis) -> list[Chart | None]:
    return [
        waterfall(runs[0]) if len(runs) == 1 else _shares(runs),
        spent(runs),
        curves("price", "Dollars per billion tokens", "at each step's speed", runs, "dollars_per_billion_tokens", over, section=SECTION,
               color="@orange", hover="$%{y:.4~g}/B tokens", prefix="$", median=True),
    ]  # fmt: skip


def waterfall(run: Run) -> Chart | None:
    """Each part on the shoulders of those before it; the last bar is all of them."""
    found = run.waterfall()
    parts = [part for part in found.parts if part.dollars > 0] if found else []
    if not parts:
        return None
    whole = sum(part.dollars for part in parts)
    shown = lambda part: f"{units.money(part.dollars)} · {units.percent(part.dollars / whole)}"
    hover = "%{customdata[0]}<br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>"
    told = [[part.name, f"{shown(part)} · {units.duration(part.seconds)}", part.source] for part in parts]
    names = [part.name for part in parts]
    base, bases = 0.0, []
    for part in parts:
        bases.append(base)
        base += part.dollars
    data = [
        {"type": "bar", "x": [*names, "all"], "y": [*(part.dollars for part in parts), whole], "base": [*bases, 0.0],
         "marker": {"color": [*(COLORS.get(name, "@blue") for name in names), "@text"]},
         "text": [*(units.money(part.dollars) for part in parts), units.money(whole)], "textposition": "outside", "cliponaxis": False,
         "customdata": [
             *told, ["all", f"{units.money(whole)} · {units.duration(sum(p.seconds for p in parts))}", "what the devices were held for"]],
         "hovertemplate": hover, "textfont": {"color": "@soft", "size": 11}}
    ]  # fmt: skip
    layout = {"xaxis": {"showgrid": False, "tickangle": -35}, "yaxis": {"tickprefix": "$", "range": [0, 1.12 * whole]}, "bargap": 0.25}
    useful = next((part.dollars for part in parts if part.name == "compute"), None)
    subtitle = (
        f"{units.percent(useful / whole)} of {units.money(whole)} computed what was asked for" if useful else f"{units.money(whole)} in all"
    )
    sources = sorted({part.source for part in parts if part.source.startswith("from")})
    subtitle += f"; steps are divided as {sources[0].removeprefix('from ')} were" if sources else ""
    return Chart("waterfall", "Where each dollar went", subtitle, data, layout, wide=True, height=360, section=SECTION)


def _shares(runs: Sequence[Run]) -> Chart | None:
    """Of several runs: a bar for each, of the same parts."""
    accounts = {run: found for run in runs if (found := run.waterfall()) and any(part.dollars > 0 for part in found.parts)}
    if not accounts:
        return None
    names = list(dict.fromkeys(part.name for account in accounts.values() for part in account.parts if part.dollars > 0))
    data = []
    for i, name in enumerate(names):
        of = {run: sum(part.dollars for part in account.parts if part.name == name) for run, account in accounts.items()}
        pattern = {"pattern": {"shape": "/"}} if i >= SERIES else {}
        data.append({
            "type": "bar", "orientation": "h", "name": name, "y": [text(run.label) for run in accounts], "x": list(of.values()),
            "marker": {"color": f"@series{i % SERIES}", **pattern}, "hovertemplate": f"{name}: $%{{x:.4~g}}<extra>%{{y}}</extra>",
        })  # fmt: skip
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "dollars"}, "tickprefix": "$"},
        "yaxis": {"autorange": "reversed"},
        "showlegend": True,
    }
    return Chart(
        "waterfall", "Where each dollar went", "by cause", data, layout, wide=True, height=150 + 44 * len(accounts), section=SECTION
    )


def spent(runs: Sequence[Run]) -> Chart | None:
    """By time; of one run with its budget, and with what its last steps' speed and price make of the rest."""
    over, several = axis("seconds", runs), len(runs) > 1
    data = [
        line(run, "dollars", over, hover="$%{y:.4~g} spent", label=run.label if several else "spent", share=len(runs),
             **(style(i) if several else {"color": "@orange"}))
        for i, run in enumerate(runs)
    ]  # fmt: skip
    data = [trace for trace in data if trace]
    if not data:
        return None
    shapes, words, subtitle = marks(runs, over), [], "since the run began, restarts and lost work included"
    if not several:
        run = runs[0]
        budget = run.config.budget_usd if run.config else 0.0
        ahead = run.projection()
        at, now = run.seconds, run.number("dollars")
        if ahead and at is not None and now is not None and ahead.dollars.middle:
            for bound, dash in (("low", "dot"), ("middle", "dash"), ("high", "dot")):
                x = [at / over.unit, (at + getattr(ahead.seconds, bound)) / over.unit]
                y = [now, now + getattr(ahead.dollars, bound)]
                data.append({"type": "scatter", "mode": "lines", "x": x, "y": y,
                "name": "projected" if bound == "middle" else f"projected, {bound}",
                             "line": {"color": "@muted", "width": 1.4, "dash": dash}, "showlegend": bound == "middle",
                             "hovertemplate": f"projected ({bound}): $%{{y:.4~g}}<extra></extra>"})  # fmt: skip
            subtitle += "; dashed: projected from the last steps"
        if budget:
            shapes.append(level(budget, "@red"))
            words.append(word(budget, f"budget {units.money(budget)}", "@red", right=False))
    layout = {"xaxis": xaxis(over), "yaxis": {"tickprefix": "$", "rangemode": "tozero", "exponentformat": "B"}, "shapes": shapes,
              "annotations": words, "showlegend": len(data) > 1}  # fmt: skip
    return Chart("dollars", "Dollars spent", subtitle, data, layout, section=SECTION)
