"""A run's directory as one HTML page: what ran, what it learned, how fast, how evenly, and what it cost.

The figures are those of the live page (`shoestring dash`), from `figures/`; a run that is still going,
was killed or never started has a page
too, which says what is missing. What `shoestring verify` has proved there (certificate.json) is a section of the page, or all of it where
nothing was trained; that section is in `report_layouts.py`.
"""

import html
from pathlib import Path

from ..train import metrics
from . import report_layouts
from .figures import facts, planned
from .figures.make import make_charts
from .figures.page import Page, render
from .figures.run import Run
from .verify import certificate
from .verify.certificate import Certificate


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, whole or not at all, and return its path.

    Raises FileNotFoundError if there is no such directory; everything else that is missing is said on the page.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a run directory: give the folder that holds a run's metrics.jsonl")
    proved, damaged = _read_certificate(run_dir / certificate.FILE)
    trained = any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    page = _page(Run(run_dir).look_at_all()) if trained or proved is None else _certificate_page(proved)
    page.notes.extend(damaged)
    if proved:
        page.sections.append(report_layouts.section(proved))
    path = run_dir / "report.html"
    metrics.replace_file(path, render(page))
    return path


def _read_certificate(path: Path) -> tuple[Certificate | None, list[str]]:
    """And what is wrong with it."""
    if not path.exists():
        return None, []
    try:
        return certificate.read(path), []
    except (ValueError, OSError) as error:
        return None, [f"{certificate.FILE} cannot be read: {error}. `shoestring verify` writes it anew."]


def _certificate_page(proved: Certificate) -> Page:
    title, status = str(proved.model.get("name", "")), report_layouts.status(proved)
    return Page(title=title, facts=[], status=status, notes=[], tiles=[], charts=[], config_text="", kind="certificate")


def _page(run: Run) -> Page:
    plan, notes = planned.plan(run.config) if run.config else None, facts.notes(run)
    charts = make_charts([run], planned=plan, notes=notes) if run.last else []
    if run.last and not any(chart.key == "load" for chart in charts) and not (run.config and run.config.model.num_moe_layers == 0):
        notes.append("No expert load was recorded.")
    sections = [_table("Planned beside measured", ("", "projected", "measured"), planned.table(run, plan)) if run.last else ""]
    sections.append(
        _table("Restarts and faults", ("when (UTC)", "", "what"), [(when, "", what) for when, _, what in facts.happened([run])])
    )
    return Page(
        title=run.name, facts=facts.facts(run), status=facts.status(run), notes=notes, tiles=facts.tiles(run, plan), charts=charts,
        config_text=run.config_text, method=facts.method(run), sections=[section for section in sections if section],
    )  # fmt: skip


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<section class="card wide table-card"><h2>{html.escape(title)}</h2><div class="scroll"><table class="table">'
        f"<thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
