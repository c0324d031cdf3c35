"""Rows, elements and offsets past 2^31 in memory: what gathers, exchanges and cuts them counts in 64 bits, or refuses.

Large tensors here are meta tensors, or files with holes mapped into memory: of 8 GiB only the pages that a test writes exist.
"""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.schema import OptimConfig
from shoestring.kernels.permute import permute, sum_copies, sum_copies_reference
from shoestring.kernels.row_maps import row_maps, rows_bound
from shoestring.parallel.dispatch import AllToAllDispatcher, LocalDispatcher, Routing
from shoestring.parallel.optimizer.whole import WholeOptimizer, even_cuts, unit_cuts
from shoestring.parallel.optimizer.zero import NORM_ROW, Spec, squared_norm
from shoestring.parallel.relocate import segments
from shoestring.train.model.moe import RouterStats

FAR = 2**31  # the first number that int32 does not hold
OPTIM = OptimConfig(lr=1e-3, moments="fp32")


def sparse(tmp_path, *shape, dtype):
    """Zeros that take no memory until they are written."""
    numel = torch.Size(shape).numel()
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(numel * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype).view(*shape)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("shape", [(FAR + 64, 1), (2**29 + 64, 8)], ids=["rows past int32", "elements past uint32"])
def test_gathering_far_rows(tmp_path, shape):
    """Row numbers, and element offsets row x D, past 2^31 and 2^32: forward gathers, and the sum of a token's copies. (In FP32: on a CPU
    BF16 is widened first, all of it.)"""
    rows_RD = sparse(tmp_path, *shape, dtype=torch.float32)
    far = [shape[0] - 1, shape[0] - 33, shape[0] // 2 + 5, 3]
    for value, row in enumerate(far, 1):
        rows_RD[row] = value
    found = permute(rows_RD, torch.tensor([far[2], -1, *far]))
    assert found[:, 0].tolist() == [3, 0, 1, 2, 3, 4] and (found == found[:, :1]).all()
    row_of_TK = torch.tensor([far[:2], far[2:], [far[0], far[3]]])
    for function in (sum_copies, sum_copies_reference):
        summed = function(rows_RD, row_of_TK)
        assert summed[:, 0].tolist() == [3, 7, 5] and (summed == summed[:, :1]).all()


def test_row_maps_are_64_bit(monkeypatch):
    """Every index of a micro-batch, and every count of one."""
    done = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, counts, *splits, **kwargs: (out.copy_(counts), done)[1])
    ranks = SimpleNamespace(size=lambda: 2)
    for dispatcher in (LocalDispatcher(num_experts=4, align=16), AllToAllDispatcher(num_experts=4, align=16, groups={"F": ranks})):
        r = Routing(expert_TK=torch.tensor([[0, 3], [3, 1], [2, 3]]))
        dispatcher.start(r)
        dispatcher.wait_counts(r)
        maps = ("load_E", "row_of_TK", "row_of_M", "copy_of_R", "order_N")
        tensors = [getattr(r, name) for name in maps if getattr(r, name) is not None]
        assert len(tensors) >= 3 and {t.dtype for t in tensors} == {torch.int64}
    stats = RouterStats(load_E=torch.zeros(4, dtype=torch.int64))
    stats.observe(r)
    assert stats.load_E.dtype == torch.int64


def test_rows_that_grouped_products_cannot_count_are_refused():
    """They take int32 ends: wrapped ones would be a product of other rows, or none. Nothing is allocated before."""
    assert rows_bound(FAR - 128, 1, 128) == FAR - 128
    with pytest.raises(ValueError, match="2147483648 rows"):
        row_maps(torch.empty(FAR - 31, 1, dtype=torch.int64, device="meta"), 1, 32)


def test_exchanges_of_more_elements_than_int32(monkeypatch):
    """64 peers, 4,915 to 10,000 rows each of 7,168 + 2 columns: shares are said in rows, and no element is left out."""
    rng = random.Random(0)
    sent, received = ([rng.randrange(4915, 10_000) for _ in range(64)] for _ in range(2))
    dispatcher = AllToAllDispatcher(num_experts=256, align=32, groups={"F": SimpleNamespace(size=lambda: 64), "B": None})
    tokens, copies, calls = sum(sent) // 8 + 1, sum(sent), []
    meta = lambda *shape, dtype=torch.int64: torch.empty(*shape, dtype=dtype, device="meta")
    r = Routing(
        expert_TK=meta(tokens, 8), sent_rows=sent, received_rows=received, order_N=meta(copies), row_of_M=meta(sum(received)),
    )  # fmt: skip
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, rows, *splits, **kwargs: calls.append((out.shape, rows.shape, *splits)))
    x_TD, weight_TK = meta(tokens, 7168, dtype=torch.bfloat16), meta(tokens, 8, dtype=torch.float32)
    dispatcher.to_experts(x_TD, weight_TK, r, "F")
    dispatcher.to_tokens(meta(sum(received) + 999, 7168, dtype=torch.bfloat16), None, r, "B")
    assert calls == [
        ((sum(received), 7170), (sum(sent), 7170), received, sent),
        ((sum(sent), 7168), (sum(received), 7168), sent, received),
    ]
    assert min(sum(sent), sum(received)) * 7168 > FAR


# ---------------------------------------------------------------- optimizer


class Groups:
    """Answers torch.distributed about a group that is a list of ranks, for the rank that is played."""

    def __init__(self, monkeypatch):
        self.rank = 0
        monkeypatch.setattr(dist, "get_rank", lambda group: group.index(self.rank))
        monkeypatch.setattr(dist, "get_world_size", len)
        monkeypatch.setattr(dist, "get_process_group_ranks", list)


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_flat_buffers_past_int32(monkeypatch, algorithm, ranks):
    """One layer's 256 experts on a rank, 11 G elements in one buffer: every owner's pieces, and where they lie in it."""
    groups, group = Groups(monkeypatch), tuple(range(ranks))
    shapes = {"gate_up": (256, 4096, 7168), "down": (256, 7168, 2048)}
    matrices = {"gate_up": ((2048, 7168), (2048, 7168)), "down": ((7168, 2048),)}
    starts = {"gate_up": 0, "down": 256 * 4096 * 7168}
    owned, end = {name: [] for name in shapes}, 0
    for groups.rank in range(ranks):
        specs = []
        for name, shape in shapes.items():
            param, numel = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")), torch.Size(shape).numel()
            parts = matrices[name] if algorithm == "muon" else ()
            specs.append(Spec(name=name, param=param, group=group, numel=numel, matrices=parts))
        optimizer = WholeOptimizer(specs, replace(OPTIM, algorithm=algorithm))
        state = optimizer.state()
        for spec in specs:
            assert optimizer.main_grad[spec.name].shape == shapes[spec.name]
            assert spec.param.storage_offset() == optimizer.main_grad[spec.name].storage_offset() == starts[spec.name]
            if (chunk := state.get(f"{spec.name}.master")) is not None:
                assert chunk.numel == spec.numel and chunk.data.dim() == 1
                owned[spec.name].append((chunk.offset, chunk.offset + len(chunk.data)))
                assert chunk.offset % spec.unit == len(chunk.data) % spec.unit == 0
        end = max(end, optimizer._buffers[0].cuts[-1])
    assert end >= 256 * 4096 * 7168 > 3 * FAR
    for name, pieces in owned.items():
        lows, highs = zip(*sorted(pieces))
        assert (0, *highs) == (*lows, torch.Size(shapes[name]).numel()), name


@pytest.mark.parametrize("total", [FAR - 1, FAR, 2**32 + 1, 671_026_419_200, 2**53 + 1])
@pytest.mark.parametrize("ranks", [1, 128, 2048])
def test_cuts_past_int32(total, ranks):
    cuts = even_cuts(total, ranks)
    assert len(cuts) == ranks + 1 and cuts[0] == 0 and total <= cuts[-1] < total + 64 * ranks
    assert {high - low for low, high in itertools.pairwise(cuts)} == {cuts[1]} and cuts[1] % 64 == 0


@pytest.mark.parametrize("ranks", [2, 128, 2048])
def test_cuts_between_units_past_int32(ranks):
    """The experts of 58 layers, 647 G elements whose costs add up to 1e15: nothing parted, nothing lost, shares even to one unit."""
    unit, cost = 4096 * 7168, 2048 * 2048 * 7168 * 2
    cuts, work = unit_cuts([(256, unit, cost)] * 58, [0.0] * ranks)
    assert cuts[0] == 0 and cuts[-1] == 58 * 256 * unit and cuts == sorted(cuts) and not any(cut % unit for cut in cuts)
    assert work == [(high - low) // unit * cost for low, high in itertools.pairwise(cuts)]
    assert max(work) - min(work) <= 2 * cost


def test_norms_of_long_vectors():
    """2^28 ones, which FP32 alone stops counting at 2^24, and more elements than int32 numbers, of which the shape is enough."""
    assert float(squared_norm([torch.ones(1).expand(2**28 + 3)], torch.device("cpu"))) == pytest.approx(2**28 + 3, rel=1e-12)
    assert squared_norm([torch.empty(3 * FAR + NORM_ROW + 1, device="meta")], torch.device("meta")).shape == ()


@pytest.mark.parametrize("ranks", [2, 64])
def test_moves_of_experts_past_int32(ranks):
    """256 experts of 29 M elements in another order, cut anywhere among ranks. Elements looked at: the ends of everything, and some."""
    rng, unit = random.Random(ranks), 4096 * 7168
    numel = 256 * unit
    source = rng.sample(range(256), 256)
    cuts = [0, *sorted(rng.sample(range(1, numel), ranks - 1)), numel]
    pieces = {rank: (low, high - low) for rank, (low, high) in enumerate(itertools.pairwise(cuts))}
    owner = lambda at: next(rank for rank, (low, length) in pieces.items() if low <= at < low + length)
    moves = segments(pieces, source, numel)
    assert sum(m.length for m in moves) == unit * sum(slot != old for slot, old in enumerate(source))
    targets = sorted(moves, key=lambda m: m.to_start)
    assert all(a.to_start + a.length <= b.to_start for a, b in itertools.pairwise(targets))
    for m in moves:
        for at in {0, m.length - 1, rng.randrange(m.length)}:
            slot, within = divmod(m.to_start + at, unit)
            assert m.start + at == source[slot] * unit + within
            assert (m.rank, m.to_rank) == (owner(m.start + at), owner(m.to_start + at))
    assert numel > FAR
