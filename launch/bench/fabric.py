"""`shoestring bench fabric`: measure this machine or cluster, and write what plans need to know of it as conf/cluster/NAME.yaml.

kernels (probes.py) and links (links.py), on every rank -> rates (fit.py) -> a ClusterConfig, and a file that says what was measured and
what was not. Ranks are those that torchrun has started, or else one process per core that is forked here, all of them busy at once.

Cores are shared so: a file's rates are those of one process where every core has one. Of N processes on C < N cores, each has C / N of it.
How true that is, is measured, and in the file.
"""

import dataclasses
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ...conf.compose import load
from ...conf.errors import ConfigError
from ...conf.schema import ClusterConfig, RatesConfig
from ...parallel import world
from .. import exit_codes
from ..environment import Place
from ..local import fork_ranks
from . import links, stack
from .cluster_file import CPU_TILE, MARK, Found, Machine, about, conclude, write
from .links import Links
from .probes import every_probe
from .timing import Clock, DeviceClock

PRESETS = ("h800", "h200", "h100", "b200", "a100", "rtx4090")
SHARING = (1, 2, 4, 8)  # processes
COPY_BYTES = (1 << 20, 1 << 26)  # of a copy: in a core's cache, and outside


@dataclass(frozen=True, kw_only=True)
class Request:
    """`words`: of the cluster that says what is not measured, and of vendors' peaks."""

    name: str
    out: Path
    processes: int  # on CPU; 0: as many as cores
    words: tuple[str, ...]


class HostClock:
    """The CPU is the device: what is called has been done when the call returns."""

    def ahead(self, seconds: float) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def host(self) -> float:
        return time.perf_counter()


def main(words: Sequence[str], *, say: Callable[[str], None] = print) -> int:
    """An exit code. Raises ConfigError before anything is measured. Of ranks that torchrun has started, rank 0 speaks and writes."""
    request, place = parse(words), Place.from_environment()
    check(request)
    machine = this_machine(place)
    base = base_cluster(request, machine)
    began, sharing = time.monotonic(), {}
    if machine.gpu or place:
        machine = dataclasses.replace(machine, precisions=tuple(p for p in machine.precisions if p in base.peak_tflops))
        found = _on_this_rank(machine, base.rates, place)
        if place and place.rank:
            return exit_codes.OK
    else:
        processes = request.processes or max(2, machine.cores)
        say(f"measuring {processes} processes on {machine.cores} core(s), all of them busy ...")
        found = fork_ranks(processes, _measured, machine, cpu_rates(base.rates))
        sharing = {n: statistics.mean(fork_ranks(n, _busy)) for n in SHARING}
    cluster, notes = conclude(request.name, base, machine, found, sharing)
    path = write(request.out, cluster, [*about(machine, len(found), time.monotonic() - began), *notes])
    say("\n".join([*notes, f"wrote {path}"]))
    use = _use(path)
    if not (machine.gpu or place):
        say("measuring what this software costs beside kernels and links ...")
        own, stack_notes = stack.measure(cluster, processes)
        say("\n".join([*stack_notes, f"wrote {stack.write(path.parent.parent / 'stack' / path.name, own, stack_notes)}"]))
        use = f"stack={path.stem} {use}"
    say(f"use it with {use}")
    return exit_codes.OK


# ---------------------------------------------------------------- what is asked for


def parse(words: Sequence[str]) -> Request:
    own, others = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("name", "out", "processes"):
            own[key] = value
        else:
            others.append(word)
    name = own.get("name") or (Path(own["out"]).stem if "out" in own else re.sub(r"\W+", "_", socket.gethostname().lower()))
    processes = own.get("processes", "0")
    if not re.fullmatch(r"\w[\w-]*", name):
        nearest = re.sub(r"[^\w-]+", "_", name).strip("_-") or None
        raise ConfigError("name", name, "is what cluster=NAME will say: letters, digits, _ and -", nearest)
    if not processes.isdecimal() or processes == "1":
        raise ConfigError("processes", processes, "must be a whole number from 2 on, or 0 for one per core: one alone has no links", 2)
    out = Path(own.get("out") or Path("conf") / "cluster" / f"{name}.yaml")
    return Request(name=name, out=out, processes=int(processes), words=tuple(others))


def check(request: Request) -> None:
    """Raises ConfigError for a file that is not ours to replace, or that no cluster=NAME would find."""
    out = request.out
    if out.suffix != ".yaml" or out.stem != request.name:
        rule = f"is a file that cluster={request.name} cannot find"
        raise ConfigError("out", str(out), rule, str(out.with_name(f"{request.name}.yaml")))
    if out.exists() and not out.read_text().startswith(MARK):
        raise ConfigError("out", str(out), "is there, and was not measured: give another name=", str(out.with_name(f"my_{out.name}")))


def base_cluster(request: Request, machine: Machine) -> ClusterConfig:
    """Of what is not measured. Raises ConfigError for a GPU of which no file has the peaks."""
    if any(word.startswith("cluster=") for word in request.words):
        return load(request.words).cluster
    known = next((name for name in PRESETS if name in machine.device.lower().replace(" ", "")), None) if machine.gpu else "cpu"
    if known is None:
        differs = "cluster=h100 cluster.memory_tb_s=3 cluster.peak_tflops.bf16=800"
        rule = f"is none of {', '.join(PRESETS)}: give the one most like it and set what differs, such as {differs}"
        raise ConfigError("cluster", machine.device, rule)
    return load([*request.words, f"cluster={known}"]).cluster


def this_machine(place: Place | None) -> Machine:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(place.local_rank if place else 0)
        fp8 = ("fp8",) if (properties.major, properties.minor) >= (8, 9) else ()
        return Machine(
            gpu=True, device=properties.name, cores=torch.cuda.device_count(), memory_gb=properties.total_memory / 1e9,
            sms=properties.multi_processor_count, precisions=(*fp8, "bf16", "fp32"),
        )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / cores
    return Machine(gpu=False, device="CPU core", cores=cores, memory_gb=memory / 1e9, sms=1, precisions=("fp8", "bf16", "fp32", "fp64"))


def cpu_rates(rates: RatesConfig) -> RatesConfig:
    return dataclasses.replace(rates, tile=CPU_TILE, sms=1, exchange_sms=0)


# ---------------------------------------------------------------- measuring


def _on_this_rank(machine: Machine, rates: RatesConfig, place: Place | None) -> list[Found]:
    """As one rank of a world that is started elsewhere, or (None) alone on a GPU; what every rank has found."""
    device = torch.device("cpu")
    if machine.gpu:
        device = torch.device("cuda", place.local_rank if place else 0)
        torch.cuda.set_device(device)
    if place is None:
        return [_measured(machine, rates)]
    world.join(device, timeout_s=600)
    try:
        mine = _measured(machine, rates if machine.gpu else cpu_rates(rates))
        everybody: list = [None] * place.world_size
        dist.all_gather_object(everybody, mine)
        return everybody
    finally:
        world.leave()


def _measured(machine: Machine, rates: RatesConfig) -> Found:
    """On one rank."""
    device = torch.device("cuda", torch.cuda.current_device()) if machine.gpu else torch.device("cpu")
    clock: Clock = DeviceClock() if machine.gpu else HostClock()
    seconds = 0.1 if machine.gpu else 0.02
    samples = [probe.time(device, clock, seconds) for probe in every_probe(device, machine.precisions, rates)]
    ranks, hosts = (dist.get_world_size() if dist.is_initialized() else 1), [socket.gethostname()]
    if ranks > 1:
        hosts = [""] * ranks
        dist.all_gather_object(hosts, socket.gethostname())
    return Found(
        samples=samples,
        copy_bytes_per_second=max(_copy(device, clock, size) for size in COPY_BYTES),
        links=links.measure(device, hosts) if ranks > 1 else {"intra": Links(), "inter": Links()},
        beside=links.beside(device) if ranks > 1 else None,
    )


def _copy(device: torch.device, clock: Clock, size: int) -> float:
    source, target = (torch.empty(size if device.type == "cpu" else 16 * size, dtype=torch.uint8, device=device) for _ in range(2))
    began = clock.mark()
    target.copy_(source)
    clock.seconds(began, clock.mark())
    taken = []
    for _ in range(10):
        began = clock.mark()
        target.copy_(source)
        taken.append(clock.seconds(began, clock.mark()))
    return 2 * source.nbytes / statistics.median(taken)


def _busy(seconds: float = 1.0) -> float:
    """FLOP/s of one process beside the others of its world."""
    a = torch.ones(256, 256)
    torch.mm(a, a)
    dist.barrier()
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(a, a)
        times += 1
    return 2 * 256**3 * times / (time.perf_counter() - began)


# ---------------------------------------------------------------- what is said


def _use(path: Path) -> str:
    folder = path.resolve().parent.parent
    shipped = Path(__file__).resolve().parents[2] / "conf"
    return f"cluster={path.stem}" + ("" if folder == shipped else f" --config-dir {os.path.relpath(folder)}")
