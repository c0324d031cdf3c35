"""Whose CPUs are whose, on machines that are described by fake /sys trees; and that a rank of this one is bound as it says."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.launch import exit_codes, launcher, pinning
from shoestring.launch.environment import Place
from shoestring.launch.pinning import Machine


def _machine(root, nodes: dict[int, str], siblings: dict[int, str], gpus: dict[str, int] | None = None):
    """A /sys of these NUMA nodes ("0-3,8": CPUs), hyper-thread siblings of each CPU, and GPUs (PCI address: node)."""
    for node, cpus in nodes.items():
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    for cpu, those in siblings.items():
        folder = root / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{those}\n")
    for address, node in (gpus or {}).items():
        folder = root / f"bus/pci/devices/{address}"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return root


def _two_sockets(root):
    """As an eight-GPU node: 2 sockets of 8 cores with 2 threads each, numbered as Linux does: 0-7 and 8-15, then their siblings."""
    gpus = {f"0000:{0x1B + n:02x}:00.0": n // 4 for n in range(8)}
    return _machine(root, {0: "0-7,16-23", 1: "8-15,24-31"}, {c: f"{c % 16},{c % 16 + 16}" for c in range(32)}, gpus)


def _shares(machine, ranks):
    return [pinning.cores_of(machine, rank, ranks) for rank in range(ranks)]


def test_eight_ranks_of_two_sockets(tmp_path):
    machine = Machine.read(set(range(32)), _two_sockets(tmp_path))
    assert len(machine.cores) == 16 and machine.nodes[1] == {*range(8, 16), *range(24, 32)}
    assert _shares(machine, 8) == [{2 * n, 2 * n + 1, 2 * n + 16, 2 * n + 17} for n in range(8)]


def test_neighbours_where_numbers_alternate_between_sockets(tmp_path):
    """As some machines number: even CPUs on one socket, odd ones on the other."""
    sys = _machine(tmp_path, {0: "0,2,4,6", 1: "1,3,5,7"}, {c: str(c) for c in range(8)})
    assert _shares(Machine.read(set(range(8)), sys), 4) == [{0, 2}, {4, 6}, {1, 3}, {5, 7}]


def test_what_a_cgroup_leaves(tmp_path):
    """CPUs 4-9 and the siblings of 4 to 6: three whole cores, three half ones. No rank gets any other, and no node has any other."""
    allowed = {*range(4, 10), 20, 21, 22}
    machine = Machine.read(allowed, _two_sockets(tmp_path))
    assert machine.nodes == {0: {4, 5, 6, 7, 20, 21, 22}, 1: {8, 9}}
    assert _shares(machine, 3) == [{4, 20, 5, 21}, {6, 22, 7}, {8, 9}]


def test_more_ranks_than_cores_share_their_threads_and_more_than_threads_share_those(tmp_path):
    sys = _machine(tmp_path, {0: "0-3"}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    machine = Machine.read({0, 1, 2, 3}, sys)
    assert _shares(machine, 4) == [{0}, {2}, {1}, {3}]
    assert _shares(machine, 8) == [{0}, {0}, {2}, {2}, {1}, {1}, {3}, {3}]


@given(cores=st.integers(1, 60), threads=st.sampled_from([1, 2, 4]), ranks=st.integers(1, 70))
def test_shares_are_even(cores, threads, ranks):
    machine = Machine(cores=tuple(tuple(range(c * threads, (c + 1) * threads)) for c in range(cores)), nodes={})
    shares = _shares(machine, ranks)
    assert set().union(*shares) == set(range(cores * threads)) or ranks < 1
    unit = threads if cores >= ranks else 1
    assert max(map(len, shares)) - min(map(len, shares)) <= unit
    if cores * threads >= ranks:
        assert sum(map(len, shares)) == cores * threads, "two ranks have the same CPU"
    else:
        assert all(len(share) == 1 for share in shares)


def test_a_machine_that_says_nothing(tmp_path):
    machine = Machine.read({0, 1, 5}, tmp_path)
    assert machine == Machine(cores=((0,), (1,), (5,)), nodes={0: frozenset({0, 1, 5})})


def test_ranks_without_a_gpu_take_nodes_in_turn(tmp_path):
    machine = Machine.read(set(range(32)), _two_sockets(tmp_path))
    assert [min(pinning.beside(machine, rank, None)[0]) for rank in range(5)] == [0, 8, 0, 8, 0]


def test_a_node_of_memory_alone_is_nobodys(tmp_path):
    machine = Machine.read({0, 1, 2, 3}, _machine(tmp_path, {0: "0-1", 1: "", 2: "2-3"}, {}))
    assert [pinning.beside(machine, rank, None)[0] for rank in (0, 1, 2)] == [{0, 1}, {2, 3}, {0, 1}]


def _gpu(monkeypatch, bus: int, allowed: set[int], count: int = 8):
    """torch sees `count` GPUs, and this one's PCI bus; the process may use `allowed`. What it binds itself to is returned."""
    bound = []
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(cpus))
    return bound


@pytest.mark.parametrize(("rank", "cpus"), [(0, "0-7,16-23"), (3, "0-7,16-23"), (4, "8-15,24-31"), (7, "8-15,24-31")])
def test_beside_its_gpu(tmp_path, monkeypatch, rank, cpus):
    bound = _gpu(monkeypatch, 0x1B + rank, set(range(32)))
    assert pinning.pin("numa", rank, 8, "cuda", sys=_two_sockets(tmp_path)) == f"CPUs {cpus} (numa)"
    assert len(bound) >= len(os.listdir("/proc/self/task")) and {pinning.spell(b) for b in bound} == {cpus}


def test_where_no_node_is_known_nothing_is_bound(tmp_path, monkeypatch):
    sys = _two_sockets(tmp_path)
    bound = _gpu(monkeypatch, 0x99, set(range(32)))
    assert pinning.pin("numa", 0, 8, "cuda", sys=sys) == "not pinned: the machine does not say which NUMA node its GPU is beside"
    _gpu(monkeypatch, 0x1B, set(range(8, 12)))
    assert pinning.pin("numa", 0, 8, "cuda", sys=sys) == "not pinned: its GPU is beside NUMA node 0, of whose CPUs it may use none"
    _gpu(monkeypatch, 0x1B, set(range(32)), count=2)
    assert pinning.pin("numa", 5, 8, "cuda", sys=sys).startswith("not pinned")
    assert pinning.pin("none", 0, 8, "cuda", sys=sys) == "" and not bound


def test_one_node_is_every_gpus(tmp_path, monkeypatch):
    sys = _machine(tmp_path, {0: "0-3"}, {}, {"0000:1b:00.0": -1})
    _gpu(monkeypatch, 0x1B, {0, 1, 2, 3})
    assert pinning.pin("numa", 0, 1, "cuda", sys=sys) == "CPUs 0-3 (numa)"


def test_a_system_that_binds_nothing_or_refuses(monkeypatch):
    def refuse(pid, cpus):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert pinning.pin("cores", 0, 1, "cpu") == "not pinned: Operation not permitted"
    monkeypatch.delattr(os, "sched_setaffinity")
    assert pinning.pin("cores", 0, 1, "cpu").startswith("not pinned: this system")


def _pinned(config, logs, ranks):
    """A rank with a thread of before: what each of its threads may run on then, and one that it starts later."""
    place, go, seen = Place.from_environment(), threading.Event(), {}
    early = threading.Thread(target=lambda: (go.wait(10), seen.update(early=os.sched_getaffinity(0))))
    early.start()
    words = pinning.pin("cores", place.local_rank, place.local_world_size, "cpu")
    go.set(), early.join()
    late = threading.Thread(target=lambda: seen.update(late=os.sched_getaffinity(0)))
    late.start(), late.join()
    seen["main"] = os.sched_getaffinity(0)
    same = len({pinning.spell(cpus) for cpus in seen.values()}) == 1
    (logs / f"seen-{place.rank}").write_text(f"{place.local_world_size == ranks and same and words}|{pinning.spell(seen['main'])}")
    return exit_codes.OK


def test_real_ranks_are_bound_with_all_their_threads(tmp_path):
    config, before = load(["experiment=tiny", f"run_dir={tmp_path}"]), os.sched_getaffinity(0)
    ranks = min(2, len(before))
    assert launcher.start(config, "cpu", _pinned, ranks, world_size=ranks) == exit_codes.OK
    found = [path.read_text().split("|") for path in sorted(tmp_path.glob("logs/*/seen-*"))]
    assert [words for words, _ in found] == [f"CPUs {cpus} (cores)" for _, cpus in found]
    assert len({cpus for _, cpus in found}) == ranks, "two ranks have the same CPUs"
    assert os.sched_getaffinity(0) == before


def test_a_process_that_was_a_rank_has_its_cpus_back():
    before = os.sched_getaffinity(0)
    with pinning.kept():
        pinning.pin("cores", 0, len(before), "cpu")
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
