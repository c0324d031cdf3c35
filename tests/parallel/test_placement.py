"""EPLB against its published vectors and its promises; rules and measures of placement."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ConfigError
from shoestring.parallel.placement import balanced_packs, check, next_placement, rank_overload, rebalance

# 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs
LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
SLOTS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def heaviest(loads, slots, num_gpus):
    """Of the GPUs, by the definition: each replica carries an equal share of its expert's load."""
    share = len(slots) // num_gpus
    return max(sum(loads[e] / slots.count(e) for e in slots[g * share : (g + 1) * share]) for g in range(num_gpus))


@st.composite
def cases(draw):
    """(loads of two layers, replicas, groups, nodes, GPUs): nodes may or may not divide groups, GPUs may or may not divide experts."""
    nodes, groups, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.integers(1, 5))
    experts, gpus = groups * size, nodes * draw(st.integers(1, 4))
    replicas = gpus * draw(st.integers(-(-experts // gpus), -(-experts // gpus) + 3))
    one = st.lists(st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 10**9)), min_size=experts, max_size=experts)
    return [draw(one), draw(one)], replicas, groups, nodes, gpus


def test_published_vectors():
    assert rebalance(LOADS, 16, 4, 2, 8).physical_to_logical.tolist() == SLOTS


def test_global_where_groups_do_not_fit_nodes():
    """3 nodes, 4 groups: as if there were one node and one group. Worked out by hand: 8 goes alone, its replica beside the lightest."""
    found = rebalance([[8, 1, 2, 4]], 6, 4, 3, 3)
    # replicas, most loaded first: 8 -> 4 + 4, then the first of the fours again: 8/3 each; 4; 2; 1. Into 3 packs of 2:
    # 4 | 8/3 | 8/3, then 8/3 to the second, 2 to the third, 1 to the first
    assert found.physical_to_logical.tolist() == [[3, 1, 0, 0, 0, 2]]
    assert torch.equal(found.physical_to_logical, rebalance([[8, 1, 2, 4]], 6, 1, 1, 3).physical_to_logical)


@given(cases())
def test_every_replica_has_its_place(case):
    loads, replicas, groups, nodes, _ = case
    found = rebalance(loads, *case[1:])
    experts = len(loads[0])
    assert found.physical_to_logical.shape == (2, replicas)
    assert (found.counts >= 1).all() and (found.counts.sum(1) == replicas).all()
    for layer in range(2):
        slots = found.physical_to_logical[layer].tolist()
        for expert in range(experts):
            where = [slot for slot in range(replicas) if slots[slot] == expert]
            row = found.logical_to_physical[layer, expert].tolist()
            assert len(where) == found.counts[layer, expert] and row == where + [-1] * (len(row) - len(where))
        if groups % nodes == 0:
            node_of = [slot * nodes // replicas for slot in range(replicas)]
            of_group = [{node_of[slot] for slot, e in enumerate(slots) if e * groups // experts == g} for g in range(groups)]
            assert all(len(found_on) == 1 for found_on in of_group), "a group is on two nodes"
            on_node = [sum(found_on == {n} for found_on in of_group) for n in range(nodes)]
            assert on_node == [groups // nodes] * nodes


@given(cases())
def test_never_worse_than_without_replicas(case):
    """Than experts in order, and than balanced packing of single experts. The plain algorithm is, in about 1 of 100 cases."""
    loads, gpus = case[0], case[-1]
    experts = len(loads[0])
    if experts % gpus:
        return
    slots = rebalance(loads, *case[1:]).physical_to_logical.tolist()
    single = rebalance(loads, experts, *case[2:]).physical_to_logical.tolist()
    for load_E, placed, alone in zip(loads, slots, single):
        got, packed = heaviest(load_E, placed, gpus), heaviest(load_E, alone, gpus)
        in_order = heaviest(load_E, list(range(experts)), gpus)
        assert got <= packed * (1 + 1e-12) <= in_order * (1 + 1e-11)


def test_fifty_random_cases():
    """Skewed loads of the size of a real layer: never worse, and with a few replicas far better."""
    generator, better = random.Random(7), []
    for _ in range(50):
        loads = [generator.paretovariate(1.2) for _ in range(64)]
        slots = rebalance([loads], 80, 8, 2, 16).physical_to_logical[0].tolist()
        before, after = heaviest(loads, list(range(64)), 16), heaviest(loads, slots, 16)
        assert after <= before
        better.append(after / before)
    assert sum(better) / 50 < 0.6


def test_where_greedy_packing_loses():
    """The heaviest first leaves 1 and 1 apart, which would have to stay together: experts in order are better, and are what is given."""
    loads = [2, 2, 2, 1, 1, 4]
    assert balanced_packs(loads, 2) == [[5, 2, 4], [0, 1, 3]]  # 7 and 5
    assert rebalance([loads], 6, 1, 1, 2).physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 5]]  # 6 and 6


def test_replicas_go_to_what_is_heaviest_per_replica():
    assert rebalance([[10, 9]], 6, 1, 1, 1).counts.tolist() == [[3, 3]]  # 10 | 5 5 | 9 | 4.5 4.5 | 3.3 3.3 3.3 | 3 3 3


def test_one_each_stays_in_order():
    assert rebalance([[1, 5, 3]], 3, 1, 1, 3).physical_to_logical.tolist() == [[0, 1, 2]]


# ---------------------------------------------------------------- without replicas, from step to step


def nodes_of_groups(row, num_groups, num_nodes):
    """For each group of experts, the nodes that hold some of it."""
    size, share = len(row) // num_groups, len(row) // num_nodes
    return [{slot // share for slot, e in enumerate(row) if e // size == g} for g in range(num_groups)]


@given(st.lists(st.integers(0, 1000), min_size=24, max_size=24), st.permutations(range(24)), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_next_placement(loads, current, ep):
    """A permutation, never heavier than what was, on 3 nodes of 4 where there are 12 ranks: then groups stay whole."""
    loads, current = torch.tensor([loads, loads[::-1]]), torch.tensor([current, sorted(current)])
    found = next_placement(loads, current, ep, num_groups=6, gpus_per_node=4)
    assert found.dtype == torch.int64 and found.sort(1).values.tolist() == [list(range(24))] * 2
    for before, after in zip(rank_overload(loads, ep, current), rank_overload(loads, ep, found)):
        assert after <= before
    if ep == 12:
        assert all(len(nodes) == 1 for nodes in nodes_of_groups(found[1].tolist(), 6, 3))
    assert torch.equal(next_placement(loads, found, ep, num_groups=6, gpus_per_node=4), found), "moved again for nothing"


def test_next_placement_keeps_what_is_as_good():
    current = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    found = next_placement(torch.tensor([[5, 5, 5, 5], [9, 9, 1, 1]]), current, 2, num_groups=1, gpus_per_node=8)
    assert found[0].tolist() == [3, 1, 0, 2] and found[1].tolist() != [0, 1, 2, 3]


def test_next_placement_ignores_groups_inside_a_node():
    loads, current = torch.tensor([[9, 9, 0, 0]]), torch.arange(4)[None]
    assert rank_overload(loads, 2, next_placement(loads, current, 2, num_groups=2, gpus_per_node=8)) == [1.0]
    assert torch.equal(next_placement(loads, current, 2, num_groups=2, gpus_per_node=1), current), "a group is on a node"


@pytest.mark.parametrize(
    "loads, sizes, message",
    [
        ([[1, 2, 3]], (3, 2, 1, 1), "num_groups = 2: must divide experts = 3"),
        ([[1, 2, 3, 4]], (6, 2, 2, 3), "num_nodes = 2: must divide num_gpus = 3"),
        ([[1, 2, 3, 4]], (6, 2, 2, 4), "num_gpus = 4: must divide num_replicas = 6"),
        ([[1, 2, 3, 4]], (3, 1, 1, 1), "num_replicas = 3: must be at least the number of experts, 4"),
        ([[1, 2]], (2, 1, 0, 1), "num_nodes = 0: must be at least 1"),
        ([[1, float("nan")]], (2, 1, 1, 1), "finite"),
        ([[1, -1]], (2, 1, 1, 1), "not negative"),
        ([1, 1], (2, 1, 1, 1), r"shape is \(2,\)"),
    ],
)
def test_sizes_that_do_not_divide(loads, sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance(loads, *sizes)


def test_rank_overload():
    loads = [[6, 2, 1, 3], [0, 0, 0, 0], [5, 5, 5, 5]]
    assert rank_overload(loads, 2) == pytest.approx([8 / 6, 1.0, 1.0])
    assert rank_overload(loads, 4) == pytest.approx([2.0, 1.0, 1.0])
    assert rank_overload(loads, 2, torch.tensor([[0, 2, 1, 3]] * 3)) == pytest.approx([7 / 6, 1.0, 1.0])
    assert rank_overload([], 2) == [] and rank_overload(torch.tensor(loads), 1) == [1.0] * 3


def test_moving_needs_ranks_and_experts():
    words = ["data=synthetic", "parallel.placement_interval=4"]
    with pytest.raises(ConfigError, match=r"placement_interval = 4: there are no ranks: parallel.ep = 1 .* nearest valid value: 0"):
        check(load(words))
    with pytest.raises(ConfigError, match="no experts"):
        check(load([*words, "parallel.ep=2", "model.num_dense_layers=4"]))
    check(load([*words, "parallel.ep=2"]))
