"""Casts to FP8 and to E5M6. Their plain-torch peers are the ops' references, eager and compiled.

T tokens   K channels   N outputs of a weight
"""

from collections.abc import Callable

import torch

from ...kernels import e5m6, quantise
from ...kernels.quantise import BLOCK, Quantised, blocks_bytes, dequantise_blocks, dequantise_rows, rows_bytes
from . import peers
from .case import CAST_DB, Case, Peer, Sizes, uses

E5M6_DB = 40.0  # of normal numbers some 48
_wide = lambda q: [dequantise_rows(q, torch.float32)]


def cases(sizes: Sizes) -> list[Case]:
    return [*_fp8(sizes), *_e5m6(sizes)]


def _fp8(sizes: Sizes) -> list[Case]:
    T, K, (n, k) = sizes.tokens, sizes.dim, sizes.linears[-1]
    by_rows = lambda power_of_two: Case(
        op="cast by rows" + ", powers of two" * power_of_two,
        shape=f"{T}x{K}",
        make=lambda maker: (maker.normal(T, K),),
        run=lambda x: quantise.quantise_rows(x, power_of_two=power_of_two),
        exact=lambda x: [x.double()],
        read=_wide,
        least_db=CAST_DB,
        bytes=2 * T * K + rows_bytes(T, K),
        uses=uses(quantise, quantise.quantise_rows_kernel, POWER_OF_TWO=power_of_two),
        peers=_same_cast(lambda x: quantise.quantise_rows_reference(x, power_of_two=power_of_two), _wide),
    )
    return [
        by_rows(False),
        by_rows(True),
        Case(
            op="cast by columns",
            shape=f"{T}x{K}",
            make=lambda maker: (maker.normal(T, K),),
            run=quantise.quantise_columns,
            exact=lambda x: [x.double().t()],
            read=_wide,
            least_db=CAST_DB,
            bytes=2 * T * K + rows_bytes(K, T),
            uses=uses(quantise, quantise.quantise_columns_kernel, FROM_FP8=False),
            peers=_same_cast(quantise.quantise_columns_reference, _wide),
        ),
        Case(
            op="columns of rows",
            shape=f"{T}x{K}",
            make=lambda maker: (quantise.quantise_rows(maker.normal(T, K)),),
            run=quantise.columns_of,
            exact=lambda q: [dequantise_rows(q, torch.float64).t()],
            read=_wide,
            least_db=CAST_DB,
            bytes=rows_bytes(T, K) + rows_bytes(K, T),
            uses=uses(quantise, quantise.quantise_columns_kernel, FROM_FP8=True),
            peers=_same_cast(
                lambda codes, scales: quantise.columns_of_reference(Quantised(codes, scales)), _wide, lambda q: (q.codes, q.scales)
            ),
        ),
        Case(
            op="cast by blocks",
            shape=f"{n}x{k}",
            make=lambda maker: (maker.normal(n, k),),
            run=quantise.quantise_blocks,
            exact=lambda w: [w.double()],
            read=lambda q: [dequantise_blocks(q, torch.float32)],
            least_db=CAST_DB,
            bytes=2 * n * k + blocks_bytes(n, k),
            uses=uses(quantise, quantise.quantise_blocks_kernel),
            peers=_same_cast(quantise.quantise_blocks_reference, lambda q: [dequantise_blocks(q, torch.float32)]),
        ),
    ]


def _same_cast(
    reference: Callable[..., Quantised], read: Callable, prepare: Callable[..., tuple] = lambda *args: args
) -> tuple[Peer, Peer]:
    """Tensors in and out: torch.compile need not know of `Quantised`."""

    def plain(*args):
        q = reference(*args)
        return q.codes, q.scales

    return peers.plain_and_compiled(plain, lambda out: read(Quantised(*out)), prepare)


def _e5m6(sizes: Sizes) -> list[Case]:
    T, K = sizes.tokens, sizes.heads * BLOCK  # attention's output
    moved = 2 * T * K + e5m6.e5m6_bytes(T, K)
    decoded = lambda data, scales: e5m6.unpack_e5m6_reference(data, scales, K, torch.float32)
    pack = lambda x: e5m6.pack_e5m6_reference(x, quantise.ACTIVATION_FLOOR)
    return [
        Case(
            op="pack e5m6",
            shape=f"{T}x{K}",
            make=lambda maker: (maker.normal(T, K),),
            run=e5m6.pack_e5m6,
            exact=lambda x: [x.double()],
            read=lambda packed: [decoded(packed.data, packed.scales)],
            least_db=E5M6_DB,
            bytes=moved,
            uses=uses(e5m6, e5m6.pack_e5m6_kernel),
            peers=peers.plain_and_compiled(pack, lambda out: [decoded(*out)]),
        ),
        Case(
            op="unpack e5m6",
            shape=f"{T}x{K}",
            make=lambda maker: (e5m6.pack_e5m6(maker.normal(T, K)),),
            run=e5m6.unpack_e5m6,
            exact=lambda packed: [decoded(packed.data, packed.scales)],
            read=lambda x: [x],
            least_db=50.0,
            bytes=moved,
            uses=uses(e5m6, e5m6.unpack_e5m6_kernel),
            peers=peers.plain_and_compiled(
                lambda data, scales: e5m6.unpack_e5m6_reference(data, scales, K, torch.bfloat16),
                lambda x: [x],
                lambda packed: (packed.data, packed.scales),
            ),
        ),
    ]
