"""Rows in FP8 on their way to experts: what arrives is what was sent, cast once by the recipe, with its padding and its weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shoestring.kernels.fp8_rows import Fp8Rows
from shoestring.kernels.quantise import columns_of, dequantise_rows, quantise_rows
from shoestring.launch.local import fork_ranks
from shoestring.parallel.dispatch import AllToAllDispatcher, Routing, make_dispatcher
from shoestring.parallel.phases import ComputePhase, MicroBatch

E, K, T = 6, 2, 20
DIMS = [48, 128, 272]  # less than a block, one, and three of which the last is not whole
FLOOR = {"F": 1e-4, "B": 1e-30}


def cast_once(x_TD, direction):
    return dequantise_rows(quantise_rows(x_TD, power_of_two=True, floor=FLOOR[direction]), x_TD.dtype)


def exchanges(name):
    """On each rank: rows as a dispatcher in FP8 makes them, and as one in BF16 makes them of tokens that were cast before."""
    both = {d: dist.new_group(list(range(dist.get_world_size()))) for d in "FB"} if name == "alltoall" else None
    in_fp8, plain = (make_dispatcher(name, num_experts=E, align=128, groups=both, fp8=fp8) for fp8 in (True, False))
    g = torch.Generator().manual_seed(dist.get_rank())
    for dim, (direction, size) in itertools.product(DIMS, {"F": 1.0, "B": 1e-10}.items()):
        x_TD, weight_TK = torch.randn(T, dim, generator=g).mul(size).bfloat16(), torch.rand(T, K, generator=g)
        r = Routing(expert_TK=torch.rand(T, E - 2, generator=g).topk(K).indices)  # the last two have no rows
        in_fp8.start(r)
        in_fp8.wait_counts(r)
        weight = weight_TK if direction == "F" else None
        rows, weight_R = in_fp8.to_experts(x_TD, weight, r, direction).wait()
        wanted_RD, wanted_R = plain.to_experts(cast_once(x_TD, direction), weight, r, direction).wait()

        assert torch.equal(rows.wide(), wanted_RD) and wanted_RD.any()
        assert weight_R is wanted_R is None if direction == "B" else torch.equal(weight_R, wanted_R)
        padding, q = r.copy_of_R < 0, rows.quantised
        assert padding.any() and not q.codes[padding].float().any() and not q.scales[:, padding].any()
        columns = columns_of(q, floor=FLOOR[direction])  # of blocks that are padding in part, or whole
        assert columns.codes.float().isfinite().all() and columns.scales.isfinite().all() and (columns.scales > 0).all()
    return True


@pytest.mark.parametrize("name, ranks", [("local", 1), ("alltoall", 2)])
def test_rows_in_fp8_are_those_of_tokens_cast_before(name, ranks):
    assert all(fork_ranks(ranks, exchanges, name))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("weighted", [True, False])
def test_a_message_row_is_whole_16_bytes(monkeypatch, dim, weighted):
    sent = []
    arrive = lambda self, rows, *_: sent.append(rows) or SimpleNamespace(then=lambda finish: finish(rows))
    monkeypatch.setattr(AllToAllDispatcher, "_exchange", arrive)
    dispatcher = AllToAllDispatcher(num_experts=E, align=128, groups={"F": SimpleNamespace(size=lambda: 1)}, fp8=True)
    expert_TK = torch.zeros(T, 1, dtype=torch.int64)
    r = Routing(expert_TK=expert_TK, order_N=torch.arange(T), copy_of_R=torch.arange(T))
    weight_TK = torch.rand(T, 1) if weighted else None
    rows_RD, weight_R = dispatcher.to_experts(torch.randn(T, dim).bfloat16(), weight_TK, r, "F")
    (message,) = sent
    assert message.dtype == torch.uint8 and message.shape[1] % 16 == 0
    assert message.shape[1] - (dim + 4 * -(-dim // 128) + 4 * weighted) < 16, "no more than that"
    assert rows_RD.shape == (T, dim) and (weight_R is None if not weighted else torch.equal(weight_R, weight_TK.flatten()))


@pytest.mark.parametrize("recompute", [False, True])
def test_phases_hand_them_on_both_ways(recompute):
    """Forward, saved for backward or for computing again, and as the gradient of what a phase gave."""
    g = torch.Generator().manual_seed(0)
    made = lambda: Fp8Rows(quantise_rows(torch.randn(8, 128, generator=g).bfloat16()), torch.bfloat16)
    rows, grad, seen = made(), made(), []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.quantised)
            return 2 * x.wide()

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.quantised)
            return 2 * grad.wide()

    saved, tokens = [], torch.zeros(1, 8, dtype=torch.int64)
    phase = ComputePhase("x", lambda batch, rows: (Twice.apply(rows),), recompute=recompute)
    with torch.no_grad():
        (out,) = phase.forward(saved, MicroBatch(tokens_BS=tokens, targets_BN=tokens), rows)
        (back,) = phase.backward(saved, grad)
    assert seen == [rows.quantised, *[rows.quantised] * recompute, grad.quantised], "the same object, not one read and cast again"
    assert torch.equal(out, 2 * rows.wide()) and torch.equal(back, 2 * grad.wide()) and type(back) is torch.Tensor
