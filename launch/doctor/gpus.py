"""GPUs as the driver's `nvidia-smi` sees them: how many, their driver, memory errors, what slows them, and clocks.

Written to NVIDIA's documentation of `nvidia-smi --query-gpu` and tested with made-up answers: no GPU was there to try it on.
"""

import csv
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from ...conf.schema import Config
from .line import Line, fail, ok, skipped, some, warn

KIND = "machine"
_TIMEOUT_S = 20.0  # without persistence mode, the driver wakes eight GPUs for this
_FIELDS = ("index", "name", "driver_version", "persistence_mode", "ecc.errors.uncorrected.volatile.total", "clocks.sm", "clocks.max.sm")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # of drivers from 535 on, and before
IDLE = 0x1
_SLOWED = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}
_HELD = {0x2: "application clocks", 0x4: "power cap", 0x10: "sync boost", 0x100: "display clocks"}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Clocks in MHz, None where not told. `errors`: memory errors since the driver was loaded that ECC could not mend; None without ECC."""

    index: str
    name: str
    driver: str
    persistent: bool
    errors: int | None
    clock: int | None
    most: int | None
    reasons: int = 0

    @property
    def idle(self) -> bool:
        return bool(self.reasons & IDLE)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """`why`: there are none; "" where there are some. `broken`: there is a driver, which does not answer as it should."""

    gpus: tuple[Gpu, ...] = ()
    why: str = ""
    broken: bool = False


def look() -> Seen:
    if shutil.which("nvidia-smi") is None:
        return Seen(why="not seen here: there is no nvidia-smi")
    answer = ""
    for reasons in _REASONS:
        command = ["nvidia-smi", f"--query-gpu={','.join((*_FIELDS, reasons))}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Seen(why=f"nvidia-smi has not answered in {_TIMEOUT_S:g} s", broken=True)
        except OSError as error:
            return Seen(why=f"nvidia-smi cannot be run: {error.strerror}", broken=True)
        answer = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        if done.returncode == 0:
            gpus = tuple(_gpu(row) for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if len(row) == len(_FIELDS) + 1)
            return Seen(gpus=gpus, why="" if gpus else f"nvidia-smi lists none: {answer}", broken=not gpus)
    return Seen(why=f"nvidia-smi fails: {answer}", broken=True)


def _gpu(row: list[str]) -> Gpu:
    index, name, driver, persistent, errors, clock, most, reasons = (cell.strip() for cell in row)
    return Gpu(
        index=index, name=name, driver=driver, persistent=persistent.lower() != "disabled",
        errors=_number(errors), clock=_number(clock), most=_number(most), reasons=_number(reasons) or 0,
    )  # fmt: skip


def _number(text: str) -> int | None:
    """None for "[N/A]" and the like."""
    try:
        return int(text, 0)
    except ValueError:
        return None


# ---------------------------------------------------------------- lines


def check(config: Config, seen: Seen) -> Iterator[Line]:
    if not seen.gpus:
        yield _none(config, seen)
        return
    gpus, wanted = seen.gpus, config.cluster.gpus_per_node
    yield ok(KIND, "driver", gpus[0].driver, alike=True)
    names = ", ".join(dict.fromkeys(gpu.name for gpu in gpus))
    if not config.cluster.device.startswith("CPU") and len(gpus) < wanted:
        do = "lspci | grep -i nvidia; dmesg | grep -i xid: one may have fallen off the bus"
        yield fail(KIND, "GPUs", f"{len(gpus)} x {names}; cluster.gpus_per_node={wanted}", do)
    else:
        yield ok(KIND, "GPUs", f"{len(gpus)} x {names}")
    yield _build()
    yield _memory(gpus)
    yield _slowed(gpus)
    yield _clocks(gpus)
    if lazy := [gpu.index for gpu in gpus if not gpu.persistent]:
        yield warn(KIND, "persistence mode", f"off on GPU {some(lazy)}: the driver starts anew for each process", "sudo nvidia-smi -pm 1")


def _none(config: Config, seen: Seen) -> Line:
    wanted = config.launch.device == "cuda" or (config.launch.device == "auto" and not config.cluster.device.startswith("CPU"))
    if seen.broken:
        make = fail if config.launch.device != "cpu" else warn
        return make(KIND, "GPUs", seen.why, "nvidia-smi; dmesg | grep -i nvrm; is the driver loaded (lsmod | grep nvidia)?")
    if wanted:
        do = "train on a machine with GPUs, or with cluster=cpu launch.device=cpu"
        return fail(KIND, "GPUs", f"{seen.why}; cluster.device={config.cluster.device}, launch.device={config.launch.device}", do)
    return skipped(KIND, "GPUs", seen.why)


def _build() -> Line:
    """Of torch, without importing it: its version says so where it was built without CUDA."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return skipped(KIND, "CUDA build", "torch is not installed")
    if version.endswith("+cpu"):
        return fail(KIND, "CUDA build", f"torch {version} is built without CUDA", "pip install -c constraints.txt --force-reinstall torch")
    found = next((v for n in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if (v := _version(n))), "")
    return ok(KIND, "CUDA build", f"torch {version}" + (f", NCCL {found}" if found else ""), alike=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _memory(gpus: tuple[Gpu, ...]) -> Line:
    bad = {gpu.index: gpu.errors for gpu in gpus if gpu.errors}
    if bad:
        value = "errors that could not be mended: " + ", ".join(f"GPU {index}: {n}" for index, n in bad.items())
        do = f"drain the node; nvidia-smi -q -d ECC,ROW_REMAPPER; sudo nvidia-smi -r -i {next(iter(bad))}"
        return fail(KIND, "GPU memory (ECC)", value, do)
    if all(gpu.errors is None for gpu in gpus):
        return skipped(KIND, "GPU memory (ECC)", "these GPUs count no errors: ECC is off, or they have none")
    return ok(KIND, "GPU memory (ECC)", "no error that could not be mended")


def _slowed(gpus: tuple[Gpu, ...]) -> Line:
    named = lambda table: {g.index: [why for bit, why in table.items() if g.reasons & bit] for g in gpus}
    slowed, held = ({index: whys for index, whys in named(table).items() if whys} for table in (_SLOWED, _HELD))
    say = lambda found: "; ".join(f"GPU {index}: {', '.join(whys)}" for index, whys in found.items())
    if slowed:
        return fail(KIND, "GPU slowdown", say(slowed), "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER; cooling and power of the node")
    if held:
        do = "nvidia-smi -q -d PERFORMANCE,CLOCK; sudo nvidia-smi -rac; sudo nvidia-smi -rgc"
        return warn(KIND, "GPU slowdown", f"held back: {say(held)}", do)
    return ok(KIND, "GPU slowdown", "nothing holds them back")


def _clocks(gpus: tuple[Gpu, ...]) -> Line:
    known = [gpu for gpu in gpus if gpu.clock is not None and gpu.most]
    if not known:
        return skipped(KIND, "GPU clocks", "the driver does not tell")
    low = [gpu for gpu in known if not gpu.idle and gpu.clock < 0.7 * gpu.most]
    if low:
        value = ", ".join(f"GPU {gpu.index} at {gpu.clock} of {gpu.most} MHz, and not idle" for gpu in low)
        return warn(KIND, "GPU clocks", value, "nvidia-smi -q -d CLOCK,PERFORMANCE; who uses them? nvidia-smi pmon -c 1")
    idle = sum(gpu.idle for gpu in known)
    least = min(known, key=lambda gpu: gpu.clock)
    return ok(KIND, "GPU clocks", f"{least.clock} of {least.most} MHz or more" + (f"; {idle} of {len(known)} idle" if idle else ""))
