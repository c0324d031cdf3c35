"""What a verification found, for people (lines of a table) and for programs (certificate.json)."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...conf.schema import Config
from ...train import units
from ...train.metrics import replace_file
from .cases import Case, Invalid
from .compare import LIMITS, Deviation
from .prove import Verdict

FILE = "certificate.json"
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def row(verdict: Verdict) -> str:
    """A line of the table, and one more where a case has options or there is something to be told."""
    mark = "pass" if verdict.passed else "FAIL"
    layout = verdict.case.layout + (f" -> {verdict.resumed_on}" if verdict.resumed_on else "")
    if verdict.error:
        text = verdict.error.splitlines()[-1]
    else:
        d = verdict.broken[0] if verdict.broken else verdict.worst
        bound = f"of {d.limit:.0e}" if d.limit else "of 0    "
        text = f"{d.value:8.1e} {bound}  {d.quantity} of {d.where}"
    lines = [f"{mark}  {layout:<44} {text}  ({units.duration(verdict.seconds)})"]
    if options := short(verdict.case):
        lines.append(f"      {options}")
    return "\n".join([*lines, *(f"      {note}" for note in verdict.notes)])


def short(case: Case) -> str:
    """Its options without the names of their sections."""
    words = [word.rpartition(".")[2] if word.count(".") and "=" not in word.rpartition(".")[0] else word for word in case.options]
    return " ".join([*words, *([f"routing={case.routing}"] if case.routing != "natural" else [])])


def details(verdict: Verdict, lines: int = 8) -> str:
    """Everything that failed in a case, worst first."""
    if verdict.error:
        return "\n".join(f"  {line}" for line in verdict.error.splitlines()[-25:])
    more = len(verdict.broken) - lines
    return "\n".join([f"  {d}" for d in verdict.broken[:lines]] + ([f"  ... and {more} more"] if more > 0 else []))


def certificate(
    config: Config, verdicts: Sequence[Verdict], invalid: Sequence[Invalid], command: str, seconds: float, smallest: dict[str, str]
) -> dict[str, Any]:
    """As JSON. `smallest`: by a failing case's name, the command of the smallest one that still fails."""
    return {
        "passed": all(v.passed for v in verdicts),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "commit": commit(),
        "model": dataclasses.asdict(config.model),
        "steps": config.train.steps,
        "seed": config.train.seed,
        "limits": {name: dataclasses.asdict(limits) for name, limits in LIMITS.items()},
        "cases": [_case(v) | ({"smallest": smallest[v.case.name]} if v.case.name in smallest else {}) for v in verdicts],
        "invalid": [dataclasses.asdict(case) for case in invalid],
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return folder / FILE


def _case(verdict: Verdict) -> dict[str, Any]:
    return {
        "layout": verdict.case.layout,
        "options": list(verdict.case.options),
        "routing": verdict.case.routing,
        "passed": verdict.passed,
        "worst": _deviation(verdict.worst),
        "broken": [_deviation(d) for d in verdict.broken[:100]],
        "resumed_on": verdict.resumed_on,
        "notes": verdict.notes,
        "error": verdict.error,
        "seconds": round(verdict.seconds, 2),
        "command": verdict.case.command,
    }


def _deviation(d: Deviation | None) -> dict[str, Any] | None:
    if d is None:
        return None
    number = d.value if abs(d.value) < float("inf") else None  # JSON has no infinity
    return {"quantity": d.quantity, "where": d.where, "value": number, "limit": d.limit}


def versions() -> dict[str, str]:
    found = {"shoestring": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the tree that this package is, with a + where it has been changed; None where it is no git tree."""
    tree = Path(__file__).resolve().parents[2]
    try:
        git = lambda *words: subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, timeout=10, check=True).stdout
        if Path(git("rev-parse", "--show-toplevel").strip()) != tree:
            return None
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
