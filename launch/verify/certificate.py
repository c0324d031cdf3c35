"""What a verification found, as data: certificate.json, which the report (`launch/report.py`) and other programs read.

Nothing heavy is imported here, so that whoever only reads a certificate need not wait for torch.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...conf.schema import Config
from ...train.metrics import from_plain, replace_file

if TYPE_CHECKING:
    from .compare import Deviation, Limits

FILE = "certificate.json"
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A deviation. `value` is None where it is infinite or no number; a `limit` of 0 means that it must be equal."""

    quantity: str
    where: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.quantity} {self.where}" if self.where.startswith("after ") else f"{self.quantity} of {self.where}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case. `broken`: what failed, worst first; `worst`: nearest to its limit, failed or not; `smallest`: the command of the smallest
    case that still fails."""

    layout: str
    options: list[str]
    routing: str
    passed: bool
    worst: Measure | None
    broken: list[Measure]
    resumed_on: str
    notes: list[str]
    error: str
    seconds: float
    command: str
    smallest: str = ""

    @property
    def name(self) -> str:
        return " ".join([self.layout, *self.options, *self._routing])

    @property
    def short(self) -> str:
        """Its options without the names of their sections."""
        keys = [word.partition("=") for word in self.options]
        return " ".join([*(key.rpartition(".")[2] + equals + value for key, equals, value in keys), *self._routing])

    @property
    def _routing(self) -> list[str]:
        return [f"routing={self.routing}"] if self.routing != "natural" else []


@dataclass(frozen=True, kw_only=True)
class Invalid:
    """A case that cannot run, and the rule that says so."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """`target`: who was held against the reference. `commit`: with a + where files differ from it; None outside of a git tree.

    `limits`: by precision, of each kind of quantity.
    """

    passed: bool
    target: str
    command: str
    date: str
    seconds: float
    versions: dict[str, str]
    commit: str | None
    model: dict
    steps: int
    seed: int
    limits: dict[str, dict]
    cases: list[Result] = field(default_factory=list)
    invalid: list[Invalid] = field(default_factory=list)


# ---------------------------------------------------------------- made


def certificate(
    config: Config, results: Sequence[Result], invalid: Sequence[Invalid], limits: "Mapping[str, Limits]", *,
    command: str, seconds: float, target: str = "shoestring",
) -> Certificate:  # fmt: skip
    """Of cases over the base `config`, with the versions and the commit of now. A certificate without a case has not passed."""
    return Certificate(
        passed=bool(results) and all(result.passed for result in results),
        target=target,
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        versions=versions(),
        commit=commit(),
        model=dataclasses.asdict(config.model),
        steps=config.train.steps,
        seed=config.train.seed,
        limits={name: dataclasses.asdict(of_precision) for name, of_precision in limits.items()},
        cases=list(results),
        invalid=list(invalid),
    )


def measure(d: "Deviation") -> Measure:
    return Measure(quantity=d.quantity, where=d.where, value=d.value if math.isfinite(d.value) else None, limit=d.limit)


# ---------------------------------------------------------------- the file


def write(folder: Path, content: Certificate) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, json.dumps(dataclasses.asdict(content), indent=1, allow_nan=False) + "\n")
    return folder / FILE


def read(path: Path) -> Certificate:
    """Raises ValueError that says what is wrong with the file, OSError where it cannot be opened."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(plain, dict):
        raise ValueError("not an object")
    cases, invalid = plain.get("cases"), plain.get("invalid")
    if not isinstance(cases, list) or not isinstance(invalid, list):
        raise ValueError("no list of cases and of those that are invalid")
    results, refused = [_result(case) for case in cases], [from_plain(Invalid, case) for case in invalid]
    return from_plain(Certificate, plain | {"cases": results, "invalid": refused})


def _result(plain: Any) -> Result:
    if not isinstance(plain, dict) or not isinstance(plain.get("broken"), list):
        raise ValueError(f"no case: {str(plain)[:60]}")
    worst = plain.get("worst")
    measures = {"worst": worst and from_plain(Measure, worst), "broken": [from_plain(Measure, d) for d in plain["broken"]]}
    return from_plain(Result, plain | measures)


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
