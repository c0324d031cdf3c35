"""The matrix products of a layer: FP8 and BF16, dense and by expert.

Shapes are a linear's, rows x outputs x inputs, whichever of its products it is.

M rows   N outputs   K inputs   R rows of all experts   e experts
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import fp8_linear
from ...kernels.fp8_grouped import add_fp8_grouped_outer, fp8_grouped_matmul
from ...kernels.fp8_linear import add_fp8_outer, fp8_matmul
from ...kernels.fp8_weights import Fp8Weight
from ...kernels.grouped import RowGroups, grouped_linear
from ...kernels.quantise import (
    GRADIENT_FLOOR,
    Quantised,
    blocks_bytes,
    columns_of,
    dequantise_blocks,
    dequantise_rows,
    quantise_columns,
    quantise_rows,
    rows_bytes,
)
from ...kernels.weight_grad import WeightGradStore, add_outer
from . import peers
from .case import Case, Maker, Peer, Sizes, uses

BF16 = torch.bfloat16
LEAST_DB = 45.0  # of products against exact ones of the same codes: BF16 results have 56 dB
WEIGHT_SCALE = 0.02


def cases(sizes: Sizes) -> list[Case]:
    m, grouped = sizes.tokens, range(len(sizes.grouped))
    return [
        *(_dense("fp8 fprop", m, n, k, (n, k), sizes.published.get((n, k))) for n, k in sizes.linears),
        *(_dense("fp8 dgrad", m, k, n, (n, k)) for n, k in sizes.linears),
        *(_dense_wgrad(m, n, k) for n, k in sizes.linears),
        *(_grouped("fp8 grouped fprop", sizes, *sizes.grouped[i], sizes.grouped[i]) for i in grouped),
        *(_grouped("fp8 grouped dgrad", sizes, *sizes.grouped[i][::-1], sizes.grouped[i]) for i in grouped),
        *(_grouped_wgrad(sizes, n, k) for n, k in sizes.grouped),
        *(_bf16_grouped(sizes, n, k) for n, k in sizes.grouped),
    ]


def _wide_rows(q: Quantised) -> Tensor:
    return dequantise_rows(q, torch.float64)


def _dense(op: str, m: int, out: int, depth: int, linear: tuple[int, int], published: float | None = None) -> Case:
    """dgrad is the same product with the transposed weight: `out` and `depth` change places."""

    def make(maker: Maker) -> tuple:
        x_MK, w_NK = maker.normal(m, depth), maker.normal(out, depth, scale=WEIGHT_SCALE)
        return quantise_rows(x_MK, floor=GRADIENT_FLOOR), Fp8Weight(w_NK).blocks, x_MK, w_NK

    return Case(
        op=op,
        shape=f"{m}x{linear[0]}x{linear[1]}",
        make=make,
        run=lambda a, b, *_: fp8_matmul(a, b, BF16),
        exact=lambda a, b, *_: [_wide_rows(a) @ dequantise_blocks(b, torch.float64).t()],
        read=lambda out: [out],
        least_db=LEAST_DB,
        flops=2 * m * out * depth,
        bytes=rows_bytes(m, depth) + blocks_bytes(out, depth) + 2 * m * out,
        ceiling="fp8",
        published=published,
        uses=uses(fp8_linear, fp8_linear.fp8_matmul_kernel, GROUPED=False),
        peers=(
            Peer(
                name=peers.BLOCK_WISE,
                run=peers.block_wise(BF16, weight=True),
                prepare=lambda a, b, *_: peers.blocks_for_torch(a, b, weight=True),
                read=lambda out: [out],
            ),
            Peer(name=peers.ROW_WISE, run=peers.row_wise(BF16), prepare=lambda a, b, x, w: peers.rows_for_torch(x, w)),
            Peer(name=peers.BF16, run=torch.mm, prepare=lambda a, b, x, w: (x, w.t())),
        ),
    )


def _dense_wgrad(m: int, n: int, k: int) -> Case:
    def make(maker: Maker) -> tuple:
        grad_MN, x_MK = maker.normal(m, n), maker.normal(m, k)
        main_NK = torch.zeros(n, k, device=maker.device)
        return main_NK, quantise_columns(grad_MN, floor=GRADIENT_FLOOR), columns_of(quantise_rows(x_MK)), grad_MN, x_MK

    def run(main, a, b, *_):
        add_fp8_outer(main, a, b)
        return main

    def add(main, grad, x):
        add_outer(main, grad, x)
        return main

    return Case(
        op="fp8 wgrad",
        shape=f"{m}x{n}x{k}",
        make=make,
        run=run,
        exact=lambda main, a, b, *_: [_wide_rows(a) @ _wide_rows(b).t()],
        read=lambda main: [main],
        least_db=LEAST_DB,
        flops=2 * m * n * k,
        bytes=rows_bytes(n, m) + rows_bytes(k, m) + 8 * n * k,
        ceiling="fp8",
        uses=uses(fp8_linear, fp8_linear.add_fp8_outer_kernel, GROUPED=False),
        peers=(
            Peer(
                name=peers.BLOCK_WISE,
                run=peers.block_wise(torch.float32, weight=False),
                prepare=lambda main, a, b, *_: peers.blocks_for_torch(a, b, weight=False),
                read=lambda out: [out],
            ),
            Peer(
                name=peers.ROW_WISE,
                run=peers.row_wise(BF16),
                prepare=lambda main, a, b, grad, x: peers.rows_for_torch(grad.t().contiguous(), x.t().contiguous()),
            ),
            Peer(name=f"{peers.BF16} and a sum in FP32", run=add, prepare=lambda main, a, b, grad, x: (torch.zeros_like(main), grad, x)),
        ),
    )


def _groups(sizes: Sizes, maker: Maker) -> RowGroups:
    return RowGroups.of([sizes.rows_per_expert] * sizes.experts, maker.device)


def _grouped(op: str, sizes: Sizes, out: int, depth: int, linear: tuple[int, int]) -> Case:
    rows, experts = sizes.rows, sizes.experts

    def make(maker: Maker) -> tuple:
        x_RK, w_eNK = maker.normal(rows, depth), maker.normal(experts, out, depth, scale=WEIGHT_SCALE)
        return quantise_rows(x_RK, floor=GRADIENT_FLOOR), Fp8Weight(w_eNK).blocks, _groups(sizes, maker), x_RK, w_eNK

    def exact(a, b, groups, *_):
        shares = zip(_wide_rows(a).chunk(experts), b.codes, b.scales)
        return [torch.cat([x @ dequantise_blocks(Quantised(*w), torch.float64).t() for x, *w in shares])]

    return Case(
        op=op,
        shape=f"{experts}*{sizes.rows_per_expert}x{linear[0]}x{linear[1]}",
        make=make,
        run=lambda a, b, groups, *_: fp8_grouped_matmul(a, b, groups, BF16),
        exact=exact,
        read=lambda out: [out],
        least_db=LEAST_DB,
        flops=2 * rows * out * depth,
        bytes=rows_bytes(rows, depth) + experts * blocks_bytes(out, depth) + 2 * rows * out,
        ceiling="fp8",
        published=sizes.published_grouped.get(linear) if op.endswith("fprop") else None,
        uses=uses(fp8_linear, fp8_linear.fp8_matmul_kernel, GROUPED=True),
        peers=(
            Peer(
                name=peers.ROW_WISE,
                run=peers.row_wise_grouped,
                prepare=lambda a, b, groups, x, w: peers.grouped_rows_for_torch(x, w, groups.ends_e),
            ),
            Peer(
                name=peers.BF16_GROUPED,
                run=lambda x, w_eKN, ends_e: F.grouped_mm(x, w_eKN, offs=ends_e),
                prepare=lambda a, b, groups, x, w: (x, w.transpose(1, 2), groups.ends_e),
            ),
        ),
    )


def _grouped_wgrad(sizes: Sizes, n: int, k: int) -> Case:
    rows, experts = sizes.rows, sizes.experts

    def make(maker: Maker) -> tuple:
        grad_RN, x_RK = maker.normal(rows, n), maker.normal(rows, k)
        main = torch.zeros(experts, n, k, device=maker.device)
        columns = quantise_columns(grad_RN, floor=GRADIENT_FLOOR), columns_of(quantise_rows(x_RK))
        return main, *columns, _groups(sizes, maker), grad_RN, x_RK

    def run(main, a, b, groups, *_):
        add_fp8_grouped_outer(main, a, b, groups)
        return main

    def exact(main, a, b, *_):
        shares = zip(_wide_rows(a).chunk(experts, 1), _wide_rows(b).chunk(experts, 1))
        return [torch.stack([grad @ x.t() for grad, x in shares])]

    return Case(
        op="fp8 grouped wgrad",
        shape=f"{experts}*{sizes.rows_per_expert}x{n}x{k}",
        make=make,
        run=run,
        exact=exact,
        read=lambda main: [main],
        least_db=LEAST_DB,
        flops=2 * rows * n * k,
        bytes=rows_bytes(n, rows) + rows_bytes(k, rows) + 8 * experts * n * k,
        ceiling="fp8",
        uses=uses(fp8_linear, fp8_linear.add_fp8_outer_kernel, GROUPED=True),
        peers=(
            Peer(
                name=f"{peers.BF16_GROUPED}, no sum",
                run=lambda grad_NR, x, ends_e: F.grouped_mm(grad_NR, x, offs=ends_e),
                prepare=lambda main, a, b, groups, grad, x: (grad.t(), x, groups.ends_e),
            ),
        ),
    )


def _bf16_grouped(sizes: Sizes, n: int, k: int) -> Case:
    rows, experts = sizes.rows, sizes.experts

    def make(maker: Maker) -> tuple:
        return maker.normal(rows, k), maker.normal(experts, n, k, scale=WEIGHT_SCALE), _groups(sizes, maker)

    def loop(x, w, groups):
        return torch.cat([rows @ expert.t() for rows, expert in zip(x.split(groups.sizes), w.unbind(0))])

    return Case(
        op="bf16 grouped fprop",
        shape=f"{experts}*{sizes.rows_per_expert}x{n}x{k}",
        make=make,
        run=lambda x, w, groups: grouped_linear(x, w, groups, WeightGradStore()),
        exact=lambda x, w, groups: [torch.cat([a.double() @ b.double().t() for a, b in zip(x.chunk(experts), w.unbind(0))])],
        read=lambda out: [out],
        least_db=LEAST_DB,
        flops=2 * rows * n * k,
        bytes=2 * (rows * k + experts * n * k + rows * n),
        ceiling="bf16",
        peers=(Peer(name=f"{peers.BF16}, expert by expert", run=loop, read=lambda out: [out]),),
    )
