"""A run's directory as one HTML page: what ran, what it learned, how fast, how evenly, and what it cost.

Read from config.yaml, metrics.jsonl and summary.json; a run that is still going, was killed or never started has a page too, which
says what is missing. What `shoestring verify` has proved there (certificate.json) is a section of the page, or all of it where nothing
was trained. Charts are in `report_charts.py`, that section in `report_layouts.py`, the page's look in `report_page.py`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..conf.compose import load_saved
from ..conf.phases import num_steps
from ..conf.schema import Config, ConfigError
from ..train import cost, metrics, units
from ..train.metrics import StepRecord, Summary
from . import report_layouts
from .report_charts import make_charts
from .report_gantt import make_gantt
from .report_page import Page, Tile, render
from .verify import certificate
from .verify.certificate import Certificate


@dataclass(frozen=True, kw_only=True)
class Run:
    """What could be read of a run directory. `records` are without their expert loads, of which only the last is kept."""

    name: str
    config: Config | None
    config_text: str
    records: list[StepRecord]
    loaded: StepRecord | None  # the last record that has `expert_load`
    lost: list[StepRecord]  # steps that a restart did again
    summary: Summary | None
    notes: list[str]  # what is missing, in sentences


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, whole or not at all, and return its path.

    Raises FileNotFoundError if there is no such directory; everything else that is missing is said on the page.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a run directory: give the folder that holds a run's metrics.jsonl")
    proved, damaged = _read_certificate(run_dir / certificate.FILE)
    trained = any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    page = _page(read_run(run_dir)) if trained or proved is None else _certificate_page(proved)
    page.notes.extend(damaged)
    if trained and (chart := make_gantt(run_dir / "traces", page.notes)):
        page.charts.append(chart)
    if proved:
        page.sections.append(report_layouts.section(proved))
    path = run_dir / "report.html"
    metrics.replace_file(path, render(page))
    return path


# ---------------------------------------------------------------- reading


def read_run(run_dir: Path) -> Run:
    notes: list[str] = []
    config, config_text = _read_config(run_dir / "config.yaml", notes)
    records, loaded = _read_metrics(run_dir / "metrics.jsonl", notes)
    lost, _ = _read_metrics(run_dir / metrics.LOST, []) if (run_dir / metrics.LOST).exists() else ([], None)
    summary = _read_summary(run_dir / "summary.json", notes)
    if records and summary and summary.steps < records[-1].step:
        notes.append(f"summary.json ends at step {summary.steps}, metrics.jsonl at {records[-1].step}: an earlier session wrote it.")
        summary = None
    name = config.name if config else summary.name if summary else run_dir.resolve().name
    return Run(name=name, config=config, config_text=config_text, records=records, loaded=loaded, lost=lost, summary=summary, notes=notes)


def _read_config(path: Path, notes: list[str]) -> tuple[Config | None, str]:
    consequence = "parameters, layout and device are unknown."
    if not path.exists():
        notes.append(f"There is no config.yaml: {consequence}")
        return None, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return load_saved(path), text
    except ConfigError as error:
        notes.append(f"config.yaml cannot be used ({error}): {consequence}")
    except Exception as error:  # half a YAML file fails in as many ways as there are halves
        notes.append(f"config.yaml cannot be read ({type(error).__name__}): {consequence}")
    return None, text


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[StepRecord], StepRecord | None]:
    if not path.exists():
        notes.append("There is no metrics.jsonl: no step has been recorded.")
        return [], None
    records, loaded, bad = [], None, []
    for record in metrics.scan_records(path, lambda number, why, torn: None if torn else bad.append(number)):
        loaded = record if record.expert_load else loaded
        records.append(dataclasses.replace(record, expert_load=None))
    if not records:
        notes.append("metrics.jsonl holds no complete record: no step has been recorded.")
    if bad:
        notes.append(f"{len(bad)} line(s) of metrics.jsonl are unreadable and left out, the first at line {bad[0]}.")
    return records, loaded


def _read_summary(path: Path, notes: list[str]) -> Summary | None:
    if not path.exists():
        notes.append("There is no summary.json: the run is going on, or was stopped before its end.")
        return None
    try:
        return metrics.from_plain(Summary, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        notes.append(f"summary.json cannot be read: {error}.")
        return None


def _read_certificate(path: Path) -> tuple[Certificate | None, list[str]]:
    """And what is wrong with it."""
    if not path.exists():
        return None, []
    try:
        return certificate.read(path), []
    except (ValueError, OSError) as error:
        return None, [f"{certificate.FILE} cannot be read: {error}. `shoestring verify` writes it anew."]


# ---------------------------------------------------------------- the page


def _certificate_page(proved: Certificate) -> Page:
    title, status = str(proved.model.get("name", "")), report_layouts.status(proved)
    return Page(title=title, facts=[], status=status, notes=[], tiles=[], charts=[], config_text="", kind="certificate")


def _page(run: Run) -> Page:
    notes = list(run.notes)
    if run.records and not any(r.eval_loss is not None for r in run.records):
        notes.append("No evaluation was recorded: the loss is that of training text.")
    if run.records and run.loaded is None and not (run.config and run.config.model.num_moe_layers == 0):
        notes.append("No expert load was recorded.")
    if odd := [r.step for r in run.records if not math.isfinite(r.loss)]:
        notes.append(f"The loss was not a number at {len(odd)} step(s), the first at step {odd[0]}.")
    if run.config and run.records and run.records[-1].mfu is None:
        c = run.config
        notes.append(f"MFU is unknown: the cluster {c.cluster.name} has no peak for {c.precision.products}.")
    first_moe_layer = run.config.model.num_dense_layers if run.config else 0
    charts = make_charts(run.records, run.loaded, first_moe_layer=first_moe_layer)
    return Page(
        title=run.name, facts=_facts(run), status=_status(run), notes=notes, tiles=_tiles(run), charts=charts,
        config_text=run.config_text, method=_method(run),
    )  # fmt: skip


def _status(run: Run) -> str:
    if not run.records:
        return "no step recorded"
    total = num_steps(run.config) if run.config else run.records[-1].step
    done = run.records[-1].step
    if run.summary and done >= total:
        return f"finished: {done:,} steps"
    return f"step {done:,} of {total:,}"


def _facts(run: Run) -> list[str]:
    """Short phrases under the title: what ran, where."""
    facts = []
    if run.config:
        c = run.config
        kind = "rank" if cost.num_devices(c) != c.parallel.world_size else c.cluster.device
        layout = metrics.layout_name(c.parallel).replace(" x ", " × ")
        facts = [c.model.name, layout, f"{c.parallel.world_size:,} × {kind}", c.precision.products]
    elif run.summary:
        facts = [run.summary.layout.replace(" x ", " × "), f"{run.summary.world_size:,} × {run.summary.device}"]
    restarts = run.records[-1].session if run.records else 0
    return facts + ([f"{restarts} restart{'s' * (restarts > 1)}"] if restarts else [])


def _tiles(run: Run) -> list[Tile]:
    """The run in eight numbers; those that cannot be known are dashes."""
    c, last = run.config, run.records[-1] if run.records else None
    s = run.summary or (metrics.summarize(c, run.records) if c else None)
    if s is None and last is None:
        unknown = ("Loss", "Held-out loss", "Tokens", "Tokens per second", "MFU", "Spent", "Per billion tokens")
        return [Tile(label, "–", "") for label in unknown] + [_parameter_tile(c)]
    first_loss, last_loss, tokens = (s.loss_first, s.loss_last, s.tokens) if s else (run.records[0].loss, last.loss, last.tokens)
    eval_loss = s.eval_loss if s else next((r.eval_loss for r in reversed(run.records) if r.eval_loss is not None), None)
    speed, share = (s.tokens_per_second, s.mfu) if s else (last.tokens_per_second, last.mfu)
    spent, seconds = (s.dollars, s.seconds) if s else (last.dollars, last.seconds)
    peak = cost.peak_flops(c.cluster, c.precision.products) if c else None
    devices = cost.num_devices(c) if c else None
    redone = sum(r.step_seconds for r in run.lost)
    rate = f"{devices:,} × ${c.cluster.price_per_gpu_hour:g}/h for {units.duration(seconds)}" if c else f"in {units.duration(seconds)}"
    lost = f", {units.money(cost.dollars(redone, devices, c.cluster))} of it on lost steps" if redone and c else ""
    return [
        Tile("Loss", f"{last_loss:.3f}", f"from {first_loss:.3f}, nats per token"),
        Tile("Held-out loss", *(("–", "not evaluated") if eval_loss is None else (f"{eval_loss:.3f}", "last evaluation"))),
        Tile("Tokens", units.count(tokens), f"{units.duration(seconds)} of wall time"),
        Tile("Tokens per second", units.count(speed), f"{units.count(speed / devices)} on each device" if devices else ""),
        Tile("MFU", units.percent(share), f"of {peak / 1e12:g} TFLOP/s, {c.precision.products}" if peak else "peak unknown"),
        Tile("Spent", units.money(spent), rate + lost),
        Tile("Per billion tokens", units.money(spent / tokens * 1e9 if tokens else None), "everything paid for included"),
        _parameter_tile(c),
    ]


def _parameter_tile(config: Config | None) -> Tile:
    if config is None:
        return Tile("Parameters", "–", "")
    params = cost.num_params(config.model)
    return Tile("Parameters", units.count(params.total), f"{units.count(params.active)} active per token")


def _method(run: Run) -> list[str]:
    lines = [
        "Loss is the mean next-token cross-entropy of a step, in nats.",
        "MFU counts the FLOPs that the mathematics needs: active parameters, causal attention, the head, forward and backward; no "
        "recomputation. It is relative to the device's dense peak in the run's precision.",
        "Dollars are the seconds that all devices were held, restarts, evaluations and lost steps included, times their price.",
        "MaxVio of a layer is (largest expert load − mean) / mean over the whole global batch: 0 is perfect balance.",
    ]
    if run.config:
        flops = cost.flops_per_token(run.config.model, run.config.data.seq_len)
        lines.insert(2, f"This model needs {units.si(flops.total)}FLOPs a token at sequence length {run.config.data.seq_len:,}.")
    return lines
