"""What was measured, as a cluster: rates as shares of peaks, and the file conf/cluster/NAME.yaml, whose comment says how it came about.

A CPU has no vendor's figures: its peaks are the best that was measured. A GPU's are the base's, and stay.
"""

import dataclasses
import datetime
import platform
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import yaml

from ...conf.schema import ClusterConfig
from ...train import metrics
from . import fit
from .fit import Rate, Sample
from .links import Links

MARK = "# Measured by `shoestring bench fabric`"
CPU_TILE = 16  # of a matrix product on one core, which has all of it to do


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank has measured; of links, all ranks the same. `beside`: None where there is one rank."""

    samples: list[Sample]
    copy_bytes_per_second: float
    links: dict[str, Links]
    beside: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What needs no clock. `cores`: that ranks may run on; of a GPU's machine, GPUs."""

    gpu: bool
    device: str
    cores: int
    memory_gb: float
    sms: int
    precisions: tuple[str, ...]


def conclude(
    name: str, base: ClusterConfig, machine: Machine, found: Sequence[Found], sharing: Mapping[int, float]
) -> tuple[ClusterConfig, list[str]]:
    """The cluster, and lines about how it was measured."""
    samples = [
        dataclasses.replace(timed[0], seconds=statistics.median(s.seconds for s in timed)) for timed in zip(*(f.samples for f in found))
    ]
    launch, rates = fit.kernels(samples)
    copy = statistics.median(f.copy_bytes_per_second for f in found)
    peaks = dict(base.peak_tflops) if machine.gpu else _peaks(samples, rates)
    fastest = max(rate.per_second for (table, _), rate in rates.items() if table == "memory")
    memory = base.memory_tb_s * 1e12 if machine.gpu else max(copy, fastest)
    tables = {name: dict(getattr(base.rates, name)) for name in ("products", "memory", "attention")}  # what is not timed stays as it was
    halves = dict(base.rates.products_half)
    attention_peak = peaks["bf16" if machine.gpu else "fp32"] * 1e12
    for (table, kind), rate in rates.items():
        whole = {"products": peaks.get(kind.removesuffix("_wgrad"), 0) * 1e12, "memory": memory, "attention": attention_peak}[table]
        tables[table][kind] = _short(rate.per_second / whole)
        if table == "products":
            halves[kind] = round(rate.half, 1)
    forward, backward = rates["attention", "forward"], rates["attention", "backward"]
    tables["attention"]["backward"] = _short(_at_half(backward, forward.half, _middle(samples)) / attention_peak)
    notes = [_kernel_note(samples, launch, rates), f"a copy moves {copy / 1e9:.1f} GB/s, read and written"]
    linked, link_notes = _links(base, machine, found)
    changed = dict(
        **({} if machine.gpu else {"tile": CPU_TILE, "exchange_sms": 0}),
        **tables, products_half=halves, attention_half=round(forward.half, 1),
        launch_us=_short(launch * 1e6), sms=machine.sms, **linked.pop("rates"),
    )  # fmt: skip
    cluster = dataclasses.replace(
        base, name=name, device=machine.device if not machine.gpu else base.device, peak_tflops=peaks, memory_gb=_short(machine.memory_gb),
        memory_tb_s=_short(memory / 1e12), gpus_per_node=machine.cores, rates=dataclasses.replace(base.rates, **changed), **linked,
    )  # fmt: skip
    return cluster, [*notes, *link_notes, *_sharing_notes(sharing, machine.cores)]


def _peaks(samples: Sequence[Sample], rates: Mapping[tuple[str, str], Rate]) -> dict[str, float]:
    """TFLOP/s that a core reached or, deeper, would: of each precision, whichever of its products."""
    peaks: dict[str, float] = {}
    for (table, kind), rate in rates.items():
        if table == "products":
            best = max(s.work / s.seconds for s in samples if (s.table, s.kind) == (table, kind))
            precision = kind.removesuffix("_wgrad")
            peaks[precision] = max(peaks.get(precision, 0.0), _short(max(best, rate.per_second) / 1e12))
    return peaks


def _at_half(rate: Rate, half: float, depth: float) -> float:
    """Work per second of what is deep, with another half, and as fast at this depth."""
    return rate.per_second * (1 + half / depth) / (1 + rate.half / depth)


def _middle(samples: Sequence[Sample]) -> float:
    return statistics.median(s.depth for s in samples if s.table == "attention")


def _links(base: ClusterConfig, machine: Machine, found: Sequence[Found]) -> tuple[dict, list[str]]:
    """Fields of the cluster, those of its rates under "rates", and what was measured of them. What was not stays as it was."""
    fields: dict = {"rates": {}}
    notes = []
    for kind, place in (("intra", "inside a node"), ("inter", "between nodes")):
        measured = found[0].links[kind]
        if not measured.among_all:
            notes.append(f"links {place}: not measured, there {'is one node' if kind == 'inter' else 'are no two ranks in one'}")
            continue
        latency, rate = fit.message(measured.among_all)
        one = max(fit.message(measured.to_one)[1], rate)
        peak = getattr(base, f"{kind}_node_gb_s") * 1e9 if machine.gpu else one
        fields[f"{kind}_node_gb_s"] = _short(peak / 1e9)
        fields["rates"] |= {f"{kind}_node": _short(rate / peak), f"{kind}_latency_us": _short(max(latency, 0.0) * 1e6)}
        notes.append(
            f"links {place}: {rate / 1e9:.3g} GB/s from each of {measured.ranks} that exchange with all others, after "
            f"{latency * 1e6:.0f} us; {one / 1e9:.3g} GB/s from one to one"
        )
    if not machine.gpu and "inter_node" not in fields["rates"] and "intra_node" in fields["rates"]:  # more processes than cores: same host
        fields["inter_node_gb_s"] = fields["intra_node_gb_s"]
        fields["rates"] |= {f"inter{rest}": fields["rates"][f"intra{rest}"] for rest in ("_node", "_latency_us")}
    if beside := [f.beside for f in found if f.beside]:
        compute, exchange = (_short(statistics.median(column)) for column in zip(*beside))
        fields["rates"] |= {"compute_beside_exchange": compute, "exchange_beside_compute": exchange}
    return fields, notes


def _kernel_note(samples: Sequence[Sample], launch: float, rates: Mapping[tuple[str, str], Rate]) -> str:
    off = fit.errors(samples, launch, dict(rates))
    listed = ", ".join(f"{kind} {100 * error:.0f} %" for (_, kind), error in off.items())
    return f"{len(samples)} kernels in {len(rates)} kinds; the rates are off theirs, in the middle: {listed}"


def _sharing_notes(sharing: Mapping[int, float], cores: int) -> list[str]:
    if not sharing:
        return []
    full = sharing[min(sharing, key=lambda n: abs(n - cores))]
    shown = ", ".join(f"{n}: {rate / full:.2f} ({min(1.0, cores / n):.2f})" for n, rate in sharing.items())
    return [f"core sharing: the speed of one of so many busy processes, of that with {cores} (and what {cores} / processes says): {shown}"]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# ---------------------------------------------------------------- the file


def about(machine: Machine, ranks: int, seconds: float) -> list[str]:
    """The first lines of a file's comment."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    where = machine.device if machine.gpu else f"{machine.cores} core(s), {platform.machine()}"
    versions = f"torch {torch.__version__}, triton {triton.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    unmeasured = "price, kw_per_gpu, mttf_gpu_hours, restart_minutes and checkpoint_gb_s" + (
        ", and the vendor's peaks and links, of which rates are shares" if machine.gpu else ""
    )
    return [
        f"{MARK} on {today}: {where}, {ranks} rank(s), in {seconds:.0f} s; {versions}, python {platform.python_version()}",
        f"Not measured: {unmeasured}.",
    ]


def write(path: Path, cluster: ClusterConfig, lines: Sequence[str]) -> Path:
    """`lines` become its comment; the first begins with `MARK`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = dataclasses.asdict(cluster)
    for table in [plain, plain["rates"]]:
        table.update({name: dict(value) for name, value in table.items() if isinstance(value, dict)})
    comment = "\n".join(
        line for text in lines for line in textwrap.wrap(text.removeprefix("# "), 138, initial_indent="# ", subsequent_indent="#   ")
    )
    metrics.replace_file(path, f"{comment}\n{yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)}")
    return path
