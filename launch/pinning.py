"""Which CPUs a rank computes on (`cluster.pin`): its share of its machine's, or those beside its GPU.

A machine is described by Linux's /sys, whose root is an argument, so that machines which are not here can be asked about. Nothing here
moves memory: by Linux's usual policy a page lies on the node of the CPU that touches it first, so a rank that is pinned before it
allocates has its memory beside it. What it shares with others (the page cache, shared memory) lies where whoever was first put it.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SYS = Path("/sys")
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Of the CPUs that this process may use. `cores`: each one's hyper-threads, node by node, in order; `nodes`: CPUs of each NUMA node."""

    cores: tuple[tuple[int, ...], ...]
    nodes: dict[int, frozenset[int]]

    @classmethod
    def read(cls, allowed: set[int], sys: Path = SYS) -> "Machine":
        nodes = {int(path.name[4:]): _numbers(path / "cpulist") & allowed for path in sys.glob("devices/system/node/node[0-9]*")}
        nodes = {node: frozenset(cpus) for node, cpus in sorted(nodes.items()) if cpus} or {0: frozenset(allowed)}
        node_of = {cpu: node for node, cpus in nodes.items() for cpu in cpus}
        siblings = lambda cpu: _numbers(sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") & allowed or {cpu}
        cores = {tuple(sorted(siblings(cpu))) for cpu in allowed}
        return cls(cores=tuple(sorted(cores, key=lambda core: (node_of.get(core[0], -1), core))), nodes=nodes)


def pin(how: str, local_rank: int, local_world: int, device_type: str, *, sys: Path = SYS) -> str:
    """Bind every thread of this process, and those that they start, to the CPUs of one of `local_world` ranks of a machine; in words,
    what came of it ("" for `how`=none). `how`: see `cores_of` and `beside`. Nothing is bound, and the words say why, where it cannot be.

    The CPUs that this process may use (a cgroup's, a batch system's) are taken for those of all ranks of the machine together.
    """
    if how == "none":
        return ""
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned: this system binds no process to CPUs"
    machine = Machine.read(os.sched_getaffinity(0), sys)
    if how == "cores":
        cpus, why = cores_of(machine, local_rank, local_world), ""
    else:
        cpus, why = beside(machine, local_rank, _node_of_gpu(local_rank, sys) if device_type == "cuda" else None)
    try:
        if cpus:
            _bind(cpus)
    except OSError as error:
        return f"not pinned: {error.strerror}"
    return f"CPUs {spell(cpus)} ({how})" if cpus else f"not pinned: {why}"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What a process that is a rank for a while may use is afterwards what it was."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        if before is not None and os.sched_getaffinity(0) != before:
            _bind(before)


# ---------------------------------------------------------------- of a machine that need not be this one


def cores_of(machine: Machine, local_rank: int, local_world: int) -> set[int]:
    """A rank's share: neighbouring cores, as many as any other's or one more. Hyper-threads of a core stay together, as long as there is a
    core for each rank; ranks share CPUs only where there are fewer of them than ranks."""
    units = machine.cores
    if len(units) < local_world:
        units = tuple((cpu,) for core in machine.cores for cpu in core)
    first, end = (len(units) * n // local_world for n in (local_rank, local_rank + 1))
    return {cpu for unit in units[first : max(end, first + 1)] for cpu in unit}


def beside(machine: Machine, local_rank: int, node: int | None) -> tuple[set[int], str]:
    """The CPUs of a rank's NUMA node, or none and why: its GPU's `node`; without a GPU (None) nodes in turn. -1: not known, as on many
    machines of one node."""
    nodes = list(machine.nodes)
    if node is None:
        node = nodes[local_rank % len(nodes)]
    elif node < 0 and len(nodes) == 1:
        node = nodes[0]
    if node < 0:
        return set(), "the machine does not say which NUMA node its GPU is beside"
    if node not in machine.nodes:
        return set(), f"its GPU is beside NUMA node {node}, of whose CPUs it may use none"
    return set(machine.nodes[node]), ""


def gpu_node(pci_address: str, sys: Path = SYS) -> int:
    """The NUMA node of a PCI device such as "0000:1b:00.0"; -1 where the machine does not say."""
    try:
        return int((sys / "bus/pci/devices" / pci_address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def spell(cpus: set[int]) -> str:
    """{0, 1, 2, 8} is "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def _numbers(path: Path) -> set[int]:
    """Of a file such as "0-2,8"; none of one that is not there."""
    try:
        parts = [part.partition("-") for part in path.read_text().strip().split(",") if part]
    except OSError:
        return set()
    return {cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1)}


# ---------------------------------------------------------------- this process


def _bind(cpus: set[int]) -> None:
    """Threads inherit from the one that starts them; those that are there already (of imports, of a driver) are bound one by one."""
    os.sched_setaffinity(0, cpus)
    for task in os.listdir(_TASKS) if _TASKS.exists() else ():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task), cpus)


def _node_of_gpu(index: int, sys: Path) -> int:
    """Of the GPU that torch numbers so (not seen here: no GPU); -1 of one that is not there, which whoever wants to use it will say."""
    if index >= torch.cuda.device_count():
        return -1
    of = torch.cuda.get_device_properties(index)
    return gpu_node(f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0", sys)
