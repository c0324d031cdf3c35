"""What real ranks find out about each other, with troubles planted in one of them: a clock, a link, a version, a folder."""

import os
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.launch.bench import links
from shoestring.launch.doctor import ranks
from shoestring.launch.doctor.ranks import Member, rounds, tournament
from shoestring.launch.local import fork_ranks

CPU = torch.device("cpu")
CLUSTER = load().cluster
H100 = load(["cluster=h100"]).cluster


def members(num: int, local: int | None = None) -> list[Member]:
    """`local`: ranks of a node."""
    local = local or num
    return [Member(rank=r, node=r // local * local, host=f"host{r // local}", versions={"torch": "2.13.0"}) for r in range(num)]


# ---------------------------------------------------------------- who is tried when


@given(st.integers(2, 65))
def test_everybody_meets_everybody_once_in_as_few_rounds_as_can_be(num):
    played = list(tournament(list(range(num))))
    assert len(played) == num - 1 + num % 2
    assert sorted(pair for round in played for pair in round) == list(combinations(range(num), 2))
    assert all(len({rank for pair in round for rank in pair}) == 2 * len(round) for round in played)


def test_in_a_large_world_every_link_of_a_node_and_every_two_nodes():
    nodes = [list(range(8 * n, 8 * n + 8)) for n in range(12)]
    played = list(rounds(nodes))
    assert len(played) == 7 + 11
    assert all(len({rank for pair in round for rank in pair}) == 2 * len(round) for round in played)
    pairs = [pair for round in played for pair in round]
    assert len(pairs) == len(set(pairs)) == 12 * 28 + 66 * 8
    assert {(a // 8, b // 8) for a, b in pairs if a // 8 != b // 8} == set(combinations(range(12), 2))


def test_nodes_of_unequal_size():
    pairs = [pair for round in rounds([list(range(40)), list(range(40, 70))]) for pair in round]
    assert len(pairs) == len(set(pairs)) == 40 * 39 // 2 + 30 * 29 // 2 + 30


# ---------------------------------------------------------------- links


def tried(slow: tuple, seconds: float) -> list:
    """On one of four ranks: each message between a pair of `slow` takes longer."""
    send = dist.send

    def delayed(tensor, peer, *args, **kwargs):
        if tuple(sorted((dist.get_rank(), peer))) in slow:
            time.sleep(seconds)
        send(tensor, peer, *args, **kwargs)

    links.dist.send = delayed
    return ranks.pairs(CLUSTER, CPU, members(4))


def test_a_slow_link_is_named():
    [line] = fork_ranks(4, tried, ((1, 2),), 0.03)[0]
    assert line.state == "warn" and line.value.startswith("slow: rank 1 (host0) - rank 2 (host0) 0.0")


def test_links_that_are_alike():
    """Or nearly: somebody else may use the cores."""
    [line], *others = fork_ranks(4, tried, (), 0.0)
    assert line.value.startswith(("6 tried, ", "slow: ")) and line.state in ("ok", "warn") and others == [[], [], []]


def test_only_what_is_slow_both_times_is_named():
    seconds = dict.fromkeys(combinations(range(4), 2), 1e-3) | {(1, 2): 3e-3, (0, 3): 2.5e-3, (0, 1): 1.2e-3}
    assert list(ranks.slow_links(seconds, members(4))) == [(1, 2), (0, 3)]
    lines = lambda again, cluster=H100: list(ranks._pair_lines(cluster, seconds, again, members(4), 1 << 20))
    [line] = lines({(1, 2): 3e-3, (0, 3): 1e-3})
    assert line.state == "fail" and "rank 1 (host0) - rank 2 (host0) 0.35 GB/s" in line.value and "rank 3" not in line.value
    assert lines({(1, 2): 1e-3, (0, 3): 1e-3})[0].state == "ok"
    usual = ranks.usual(seconds, members(4), "intra")
    assert seconds[usual] == 1e-3 and lines({(1, 2): 3e-3, usual: 1.6e-3})[0].state == "ok"  # all are slower by now
    assert lines({(1, 2): 3e-3}, CLUSTER)[0].state == "warn"  # a CPU's cores are shared
    assert "all of them end at rank 0" in lines({(0, 1): 9e-3, (0, 3): 9e-3})[0].advice


def test_links_inside_nodes_and_between_them_are_not_compared():
    seconds = {pair: 1e-3 if pair in ((0, 1), (2, 3)) else 1e-2 for pair in combinations(range(4), 2)}
    assert list(ranks.slow_links(seconds, members(4, 2))) == []
    both = list(ranks._pair_lines(H100, seconds | {(1, 2): 5e-2}, {(1, 2): 5e-2}, members(4, 2), 1 << 20))
    assert [(line.check, line.state) for line in both] == [("links inside nodes", "ok"), ("links between nodes", "fail")]
    assert "rank 1 (host0) - rank 2 (host1)" in both[1].value and "ib_write_bw" in both[1].advice


def measured() -> list:
    return ranks.bandwidths(CLUSTER, CPU, members(4, 2))


def test_rates_of_all_together():
    lines = fork_ranks(4, measured)[0]
    assert [line.check for line in lines] == ["all-to-all inside nodes", "all-to-all between nodes", "all-reduce"]
    assert {line.state for line in lines} <= {"ok", "warn"} and all(0.001 < float(line.value.split()[0]) < 100 for line in lines)


@pytest.mark.parametrize(("reached", "on_gpu", "on_cpu"), [(80, "ok", "ok"), (69, "warn", "warn"), (39, "fail", "warn")])
def test_rates_against_those_expected(reached, on_gpu, on_cpu):
    assert ranks._rate_line(H100, "all-reduce", reached, 100.0, "inter_node").state == on_gpu
    assert ranks._rate_line(CLUSTER, "all-reduce", reached, 100.0, "inter_node").state == on_cpu


# ---------------------------------------------------------------- clocks


def told(off: dict) -> object:
    """On one of several ranks, some of whose clocks are off by so many seconds."""
    skew = off.get(dist.get_rank(), 0.0)
    return ranks.clocks(members(dist.get_world_size(), 1), lambda: time.time() + skew)


@pytest.mark.parametrize(
    ("world_size", "off", "state", "said"),
    [
        (4, {}, "ok", []),
        (4, {2: 0.3}, "ok", ["within 0.3", "within 0.29"]),
        (4, {2: 0.8}, "warn", ["rank 2 (host2) +0.8"]),
        (4, {2: -7.0}, "fail", ["rank 2 (host2) -7.0", "-6.99"]),
        (4, {0: 60.0}, "fail", ["rank 0 (host0) +60.0", "+59.99"]),  # the others agree with each other
        (2, {0: 7.0}, "fail", ["rank 1 (host1) -7.0", "-6.99"]),  # of two, nobody knows
    ],
)
def test_clocks_that_are_off(world_size, off, state, said):
    lines = fork_ranks(world_size, told, off)
    assert {line.state for line in lines} == {state}  # all come to the same
    assert not said or any(word in lines[0].value for word in said), lines[0].value
    assert lines[0].value.count("rank ") == (0 if state == "ok" else 1)


def bounded(late: int, off: float) -> tuple:
    """On one of three ranks: the offsets from rank 0 and their bounds, where one rank enters each second exchange late."""
    stamps, times = ranks._stamps, []

    def slowly(moment):
        times.append(moment)
        if dist.get_rank() == late and len(times) % 2 == 0:
            time.sleep(0.02)
        return stamps(moment)

    ranks._stamps, ranks._clock_line = slowly, lambda members, offsets, bounds: (offsets, bounds)
    return ranks.clocks(members(3, 1), lambda: time.time() + off * (dist.get_rank() == 2))


@pytest.mark.parametrize(("late", "off"), [(2, 0.0), (0, 3.0)])
def test_the_truth_is_within_the_bound(late, off):
    offsets, bounds = fork_ranks(3, bounded, late, off)[0]
    assert all(abs(offset - truth) <= bound for offset, bound, truth in zip(offsets, bounds, [0.0, 0.0, off]))
    assert max(bounds) > 0.009  # it cannot be known better


def test_clocks_that_could_not_be_told():
    line = ranks._clock_line(members(3), [0.0, 0.9, 0.0], [0.0, 1.0, 0.01])
    assert line.state == "warn" and "± 1.000 s only" in line.value
    assert ranks._clock_line(members(3), [0.0, 6.0, 0.0], [0.0, 2.0, 0.01]).state == "warn"  # surely more than half a second
    assert statistics.median([0.0, 6.0, 0.0]) == 0


# ---------------------------------------------------------------- versions and folders


def planted(folder: Path) -> list:
    """On one of four ranks: the third finds another deepspeed first."""
    if dist.get_rank() == 2:
        sys.path.insert(0, str(folder))
    return [(line.state, line.check, line.value) for line in ranks.look_together(load(), CPU, 0, "host")][:1]


def test_a_rank_with_another_version(tmp_path):
    (tmp_path / "deepspeed-0.18.1.dist-info").mkdir()
    (tmp_path / "deepspeed-0.18.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.1\n")
    [(state, check, value)] = fork_ranks(4, planted, tmp_path)[0]
    assert (state, check) == ("fail", "deepspeed mismatch") and value.endswith("; 0.18.1 on rank 2 (host)")


def seen(run_dir: str, blind: tuple) -> list:
    if dist.get_rank() in blind:
        os.path.exists = lambda path: False
    return [(line.state, line.value) for line in ranks.shared_folder(load([f"run_dir={run_dir}"]), members(4, 2))]


def test_a_run_directory_that_a_node_does_not_see(tmp_path):
    [(state, value)] = fork_ranks(4, seen, f"{tmp_path}/run", (2, 3))[0]
    assert state == "fail" and value.startswith("host1 does not see what host0 writes")
    [(state, value)] = fork_ranks(4, seen, f"{tmp_path}/run", ())[0]
    assert state == "ok" and not list(tmp_path.iterdir())
    [(state, value)] = fork_ranks(4, seen, "/proc/run", ())[0]
    assert state == "skipped"
