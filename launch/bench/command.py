"""`shoestring bench kernels` and `shoestring bench step`: choose the cases, run them, print the table, write JSON and page.

cases (matmul_, cast_, memory_ and layer_cases.py) -> rows (run.py, timing.py) -> table.py, results.py's JSON, page.py
"""

import dataclasses
import datetime
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton

from ...conf.errors import ConfigError, most_like
from ...train import metrics, units
from .. import exit_codes
from ..verify import certificate
from ..verify.table import Screen
from . import page, results, step, table
from .case import FACTS, SMALL, Case
from .results import Results
from .run import Bench, architecture_of, ceilings, every_case, run_case
from .timing import Clock, DeviceClock

NO_GPU = "torch sees no GPU here"
KEPT = Path(__file__).resolve().parents[2] / "docs" / "results"  # in a checkout
CLUSTERS = ("h100", "h200", "h800", "b200")


def kernels(
    *,
    only: str = "",
    shapes: str = "",
    tune: bool = False,
    check: bool = False,
    json_path: Path | None = None,
    page_path: Path | None = None,
    keep: bool = False,
    clock: Clock | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """An exit code: 0 where every result was right. ConfigError for an op or a shape that there is none of.

    `only`, `shapes`: comma-separated parts of names. `check`: no times. `clock`: of a test; else the device's.
    """
    began, gpu = time.monotonic(), torch.cuda.is_available()
    every = every_case(FACTS if gpu else SMALL)
    cases = chosen(chosen(every, only, "--only", lambda case: case.op), shapes, "--shapes", lambda case: case.shape)
    if keep and not KEPT.parent.is_dir():
        raise ConfigError(
            "--keep", str(KEPT), "is a folder of a checkout, and this package was installed without one: use --json and --page"
        )
    if check:
        clock = None
    elif clock is None and gpu:
        clock = DeviceClock()
    bench = _bench(gpu, tune, clock)
    with Screen(say) as screen:
        if not gpu:
            screen.say(f"{NO_GPU}: correctness only, at small sizes; nothing is timed.\n")
        screen.status("measuring what this device does at best ...")
        found = _new(_command(only, shapes, tune, check), bench, ceilings(bench) if bench.clock and gpu else {})
        _run(cases, bench, found, screen, lambda: json_path and results.write(json_path, found))
        found = dataclasses.replace(found, seconds=round(time.monotonic() - began, 1))
        _conclude(found, screen)
        for path, write in _outputs(found, json_path, page_path, keep):
            screen.say(f"wrote {write(path)}")
    return exit_codes.OK if found.passed else exit_codes.FAILED


def _bench(gpu: bool, tune: bool, clock: Clock | None) -> Bench:
    if not gpu:
        return Bench(device=torch.device("cpu"), clock=clock, tune=tune)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    architecture = architecture_of((properties.major, properties.minor))
    device = torch.device("cuda", torch.cuda.current_device())
    return Bench(device=device, clock=clock, tune=tune, architecture=architecture, cache_bytes=properties.L2_cache_size)


def _new(command: str, bench: Bench, found: dict[str, float]) -> Results:
    versions = {**certificate.versions(), "triton": triton.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return Results(
        device=device_name(), timed=bench.clock is not None, command=command, date=_now(), seconds=0.0, versions=versions,
        commit=certificate.commit(), ceilings=found, rows=[],
    )  # fmt: skip


def _run(cases: Sequence[Case], bench: Bench, found: Results, screen: Screen, save: Callable[[], object]) -> None:
    """`save` after each row: whoever ends this early has what there is."""
    if bench.clock:
        screen.say(table.ceilings(found) + "\n")
    screen.say(table.HEADER if bench.clock else table.HEADER.partition("time")[0].rstrip())
    for done, case in enumerate(cases):
        screen.status(f"{done} of {len(cases)}: {case.op}, {case.shape}")
        found.rows.append(run_case(case, bench))
        for line in table.lines(found.rows[-1], found):
            screen.say(line)
        save()


def _conclude(found: Results, screen: Screen) -> None:
    wrong = sum(not row.passed for row in found.rows)
    if won := list(table.winners(found)):
        screen.say("\n".join(["\nthe fastest configuration of each shape", *won]))
    if aimed := list(results.aims(found)):
        screen.say("\n".join(["\naims, on one Hopper GPU", *table.aims(aimed)]))
    screen.say(f"\n{len(found.rows) - wrong} of {len(found.rows)} right, in {units.duration(found.seconds)}")


def _outputs(found: Results, json_path: Path | None, page_path: Path | None, keep: bool) -> Iterable[tuple[Path, Callable[[Path], Path]]]:
    name = "-".join("".join(c if c.isalnum() else " " for c in found.device).lower().split())
    to_json = lambda path: results.write(path, found)
    to_page = lambda path: _write(path, page.page(found))
    wanted = [(json_path, to_json), (page_path, to_page)]
    wanted += [(KEPT / f"{name}.json", to_json), (KEPT / f"{name}.html", to_page)] if keep else []
    return [(path, write) for path, write in wanted if path is not None]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace_file(path, text)
    return path


def chosen(cases: Sequence[Case], words: str, option: str, name: Callable[[Case], str]) -> list[Case]:
    """Those whose name has one of the comma-separated `words` in it. ConfigError for one that is in none, with the nearest."""
    names = list(dict.fromkeys(map(name, cases)))
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if not any(word in known for known in names):
            raise ConfigError(option, word, f"is in no name; there are {'; '.join(names)}", most_like(word, names))
    return [case for case in cases if not wanted or any(word in name(case) for word in wanted)]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _command(only: str, shapes: str, tune: bool, check: bool) -> str:
    options = [f"--only '{only}'" * bool(only), f"--shapes '{shapes}'" * bool(shapes), "--tune" * tune, "--check" * check]
    return " ".join(["shoestring bench kernels", *filter(None, options)])


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------- training


def train_step(
    words: Sequence[str], *, steps: int = 30, out: Path = Path("runs/bench"), json_path: Path | None = None, page_path: Path | None = None,
    limit_s: float = 300.0,
) -> int:  # fmt: skip
    """An exit code: 0 where both precisions took their steps. `words`: another model than the cut of DeepSeek-V3 that fits this GPU."""
    if steps <= step.SLOW:
        raise ConfigError("--steps", steps, f"the first {step.SLOW} are not counted", step.SLOW + 5)
    if not words and not torch.cuda.is_available():
        print(f"{NO_GPU}, and DeepSeek-V3 is not trained without one: name a small model, such as experiment=smoke")
        return exit_codes.OK
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        cluster = [f"cluster={name}" for name in CLUSTERS if name in device.lower()]
        words = [*(words or step.fit(torch.cuda.get_device_properties(0).total_memory)), *cluster]
    found = step.run(words, out, device_name(), steps=steps, limit_s=limit_s)
    for run in found.runs:
        speed = f"{units.count(run.tokens_per_second)} tokens/s, MFU {units.percent(run.mfu)}"
        memory = f"peak {units.plain(run.memory_gb)} GB where the state is {units.significant(run.state_gb)} GB by train/cost.py"
        loss = f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}" if run.losses else "no loss"
        print("\n  ".join([f"{run.precision}: {speed}", memory, loss, *([run.error] if run.error else [])]))
    if found.ratio:
        print(f"fp8 / bf16: {found.ratio:.2f} x")
    for path, write in ((json_path, lambda p: step.write(p, found)), (page_path, lambda p: _write(p, page.step_page(found)))):
        if path:
            print(f"wrote {write(path)}")
    return exit_codes.FAILED if any(run.error for run in found.runs) else exit_codes.OK
