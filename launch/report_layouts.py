"""The report's section on what `shoestring verify` has proved: a verdict in words, and a row for each case.

Written without a library, so that it can be read where nothing but the file itself is left. Text is escaped here.
"""

import html
import math
from collections.abc import Sequence

from ..train import units
from .verify.certificate import Certificate, Invalid, Measure, Result
from .verify.table import nearest, numbers, place

_FROM, _TO = -17, 1  # decades that a bar shows: from below what FP64 resolves to ten times the reference itself
_MOST_BROKEN = 12
_TARGETS = {"shoestring": "", "deepspeed": " by DeepSpeed's AutoEP"}
_ICONS = {  # whoever cannot tell the colours sees the shapes, and reads the word
    True: '<svg viewBox="0 0 12 12" aria-hidden="true"><path d="M2 6.5 5 9.5 10 3"/></svg>',
    False: '<svg viewBox="0 0 12 12" aria-hidden="true"><path d="M2.5 2.5 9.5 9.5M9.5 2.5 2.5 9.5"/></svg>',
}


def status(c: Certificate) -> str:
    return f"{sum(r.passed for r in c.cases)} of {len(c.cases)} cases passed"


def facts(c: Certificate) -> list[str]:
    """Short phrases: what was proved, when, by which code."""
    commit = [f"commit {c.commit.rstrip('+')[:12]}{' with changes' if c.commit.endswith('+') else ''}"] if c.commit else []
    return [str(c.model.get("name", "")), f"{c.steps} steps", f"seed {c.seed}", c.date.replace("T", " ").replace("+00:00", " UTC"), *commit]


def section(c: Certificate) -> str:
    """HTML. Cases that fail come first."""
    e = html.escape
    cases = sorted(c.cases, key=lambda r: r.passed)
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    return f"""<section class="card wide layouts" id="layouts">
<h2>Layouts proved</h2>
<p class="verdict {"pass" if c.passed else "fail"}">{_ICONS[c.passed]}<span>{e(_verdict(c))}</span></p>
<p class="sub">{e(" · ".join([*facts(c), f"in {units.duration(c.seconds)}"]))}<br>{e(versions)}</p>
<p class="sub">Bars: the largest deviation from one process; the mark on them is its limit, and each line a factor of 10⁵.</p>
<table>
<thead><tr><th>Verdict</th><th>Layout</th><th>Resumed on</th><th>Largest deviation</th><th class="time">Time</th></tr></thead>
<tbody>{"".join(_row(r) for r in cases)}</tbody>
</table>
{_invalid(c.invalid)}{_limits(c)}
<p class="sub">Made by</p>{_command(c.command)}
</section>"""


def _verdict(c: Certificate) -> str:
    total, failed = len(c.cases), sum(not r.passed for r in c.cases)
    layouts = len({r.layout for r in c.cases})
    cases = f"{total} case{'s' * (total != 1)} on {layouts} layout{'s' * (layouts != 1)}"
    if not total:
        return "No case has been proved."
    if not failed:
        return f"{total} of {cases} compute{'s' * (total == 1)} what one process computes{_TARGETS.get(c.target, '')}."
    return f"{failed} of {cases} {'does' if failed == 1 else 'do'} not compute what one process computes{_TARGETS.get(c.target, '')}."


def _row(r: Result) -> str:
    e = html.escape
    measure = nearest(r)
    found = _bar(measure) + _where(measure, r) if measure else f'<p class="where">{e(_last_line(r.error) or "nothing to compare")}</p>'
    short = f'<span class="options">{e(r.short)}</span>' if r.short else ""
    notes = "".join(f'<p class="note">{e(note)}</p>' for note in r.notes)
    state = "pass" if r.passed else "fail"
    cells = {
        f"mark {state}": _ICONS[r.passed] + state,
        "layout": f"<b>{_breakable(r.layout)}</b>{short}",
        "resumed": _breakable(r.resumed_on),
        "found": found + notes,
        "time": e(units.duration(r.seconds)),
    }
    row = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in cells.items())
    row = f'<tr class="{state}">{row}</tr>'
    return row if r.passed else row + f'<tr class="more"><td colspan="5">{_more(r)}</td></tr>'


def _breakable(layout: str) -> str:
    return html.escape(layout).replace("/", "/<wbr>")


def _bar(m: Measure) -> str:
    """From the left on a logarithmic scale; beyond its limit it is hatched."""
    value, limit = _at(m.value), _at(m.limit)
    inside = f'<i class="in" style="width:{min(value, limit):.1f}%"></i>'
    beyond = f'<i class="out" style="left:{limit:.1f}%;width:{value - limit:.1f}%"></i>' if value > limit or not m.passed else ""
    mark = f'<i class="limit" style="left:{limit:.1f}%"></i>' if m.limit else ""
    return f'<div class="bar" role="img" aria-label="{numbers(m)}">{inside}{beyond}{mark}</div><span class="number">{numbers(m)}</span>'


def _at(value: float | None) -> float:
    """Percent of a bar's length; what is no number is beyond everything."""
    if value is None:
        return 100.0
    return min(100.0, max(0.0, 100 * (math.log10(value) - _FROM) / (_TO - _FROM))) if value > 0 else 0.0


def _where(m: Measure, r: Result) -> str:
    return f'<p class="where">{html.escape(place(m, r))}</p>'


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or [""])[-1]


def _more(r: Result) -> str:
    """Of a case that failed: the command to begin with, and everything that was wrong."""
    e = html.escape
    smallest = f'<p class="sub">The smallest case that still fails</p>{_command(r.smallest)}' if r.smallest else ""
    again = f'<p class="sub">This case again</p>{_command(r.command)}' if r.command != r.smallest else ""
    if r.error:
        return f"{smallest}{again}<details><summary>What it ended with</summary><pre>{e(r.error.strip())}</pre></details>"
    lines = "".join(f'<li><span class="number">{numbers(m)}</span> {e(place(m, r))}</li>' for m in r.broken[:_MOST_BROKEN])
    rest = f"<li>and {len(r.broken) - _MOST_BROKEN} more, in certificate.json</li>" if len(r.broken) > _MOST_BROKEN else ""
    summary = f"{_count(len(r.broken), 'deviation')} beyond the limit"
    return f"{smallest}{again}<details><summary>{summary}</summary><ul>{lines}{rest}</ul></details>"


def _command(words: str) -> str:
    return f'<pre class="command">{html.escape(words)}</pre>'


def _invalid(invalid: Sequence[Invalid]) -> str:
    """Each rule once."""
    if not invalid:
        return ""
    rules = {case.why: [other.name for other in invalid if other.why == case.why] for case in invalid}
    items = "".join(f"<li><b>{html.escape(', '.join(names))}</b><br>{html.escape(why)}</li>" for why, names in rules.items())
    return f"<details><summary>{_count(len(invalid), 'case')} that cannot run, and why</summary><ul>{items}</ul></details>"


def _limits(c: Certificate) -> str:
    e = html.escape
    kinds = list(dict.fromkeys(kind for limits in c.limits.values() for kind in limits))
    number = lambda value: f"{value:.0e}" if isinstance(value, float) and value else "–" if value is None else e(str(value))
    head = "".join(f"<th>{e(kind)}</th>" for kind in kinds)
    rows = "".join(
        f'<tr><th scope="row">{e(name)}</th>{"".join(f"<td>{number(limits.get(kind))}</td>" for kind in kinds)}</tr>'
        for name, limits in c.limits.items()
    )
    table = f'<div class="scroll"><table class="limits"><thead><tr><th>Precision</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>Limits, relative to the reference</summary>{table}</details>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


STYLE = """
:root { --good: #00694d; --bad: #b3123f; --bad-card: #fdf0f3; --track: #ececea; --tick: #d6d4cf; }
@media (prefers-color-scheme: dark) {
  :root { --good: #4fd3a8; --bad: #ff7d9f; --bad-card: #2c1a20; --track: #262a30; --tick: #3a3f47; }
}
.layouts { padding-bottom: 16px; margin-top: 16px; }
.layouts svg { width: 12px; height: 12px; margin-right: 6px; fill: none; stroke: currentColor; stroke-width: 2.2; flex: none; }
.verdict { display: flex; align-items: baseline; margin: 8px 0 6px; font-size: 19px; font-weight: 620; }
.pass.verdict, .mark.pass { color: var(--good); } .fail.verdict, .mark.fail { color: var(--bad); }
.verdict svg { width: 16px; height: 16px; margin-right: 9px; }
.layouts table { width: 100%; border-collapse: collapse; margin: 10px 0 14px; font-size: 14px; }
.layouts th { text-align: left; color: var(--muted); font-size: 12.5px; font-weight: 500; padding: 4px 14px 4px 0; }
.layouts td { border-top: 1px solid var(--line); padding: 8px 14px 8px 0; vertical-align: top; }
.layouts tr.fail td, .layouts .more td { background: var(--bad-card); } .layouts .more td { border: 0; padding: 0 12px 12px; }
.layouts tr.fail td:first-child { padding-left: 12px; } .layouts tr.fail td:last-child { padding-right: 12px; }
.mark { white-space: nowrap; font-weight: 600; width: 76px; } .layout b, .resumed { overflow-wrap: break-word; }
.layout b { font-weight: 600; }
.options { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.resumed { color: var(--soft); }
.layouts .time { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; color: var(--soft); }
.found { width: 40%; } .number { font-variant-numeric: tabular-nums; font-size: 13px; white-space: nowrap; }
.found .number { margin-left: 10px; } .where, .note { margin: 1px 0 0; font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }
.note { color: var(--warn); }
.bar { position: relative; display: inline-block; width: 180px; max-width: 55%; height: 9px; border-radius: 2px; overflow: hidden;
  vertical-align: 0;
    background: repeating-linear-gradient(90deg, transparent 0 calc(27.78% - 1px), var(--tick) 0 27.78%) 11.1% 0, var(--track); }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; } .bar .in { background: var(--accent); }
.bar .out { background: repeating-linear-gradient(135deg, var(--bad) 0 3px, transparent 3px 5px), var(--bad-card); min-width: 4px; }
.bar .limit { width: 2px; margin-left: -1px; background: var(--text); }
.layouts details { margin-top: 10px; padding: 9px 14px; background: none; } .layouts li { margin: 3px 0; overflow-wrap: anywhere; }
.layouts .command { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 8px; padding: 8px 10px; border-radius: 6px;
  background: var(--page); color: var(--text); user-select: all; }
.scroll { overflow-x: auto; } .layouts .limits { width: auto; margin: 8px 0 2px; }
.layouts .limits td, .layouts .limits th { padding: 4px 18px 4px 0; }
@media (max-width: 720px) {
  .layouts > table > thead { display: none; } .layouts > table, .layouts > table > tbody { display: block; }
  .layouts > table > tbody > tr { display: grid; grid-template-columns: auto 1fr auto; gap: 2px 10px; padding: 9px 0;
    border-top: 1px solid var(--line); }
  .layouts > table > tbody > tr.fail { background: var(--bad-card); padding: 9px 8px; }
  .layouts > table > tbody > tr.more { display: block; border: 0; padding: 0 8px 8px; background: var(--bad-card); }
  .layouts > table > tbody td, .layouts tr.fail td:first-child, .layouts tr.fail td:last-child { border: 0; padding: 0; width: auto;
    background: none; }
  .layouts .resumed { grid-column: 1 / -1; grid-row: 2; font-size: 13px; }
  .resumed:not(:empty)::before { content: "resumed on "; color: var(--muted); }
  .layouts .found { grid-column: 1 / -1; grid-row: 3; }
}
"""
