"""From each copy's expert to its row: counts, offsets and both directions of the map, without the host ever learning a count.

Rows come sorted by expert, each expert's share padded to a multiple of `align`. How many rows that makes depends on the choices, so the
buffer has room for the worst case, `rows_bound`; the rows after the last expert's belong to nobody, like padding. In a share, copies keep
the order of tokens.

    slots of copies 0-5: 1 0 1 1 0 1; align 4; three slots        copies in rows 0-11: 1 4 . . | 0 2 3 5 | | . . . .
    counts 2 4 0, ends 4 8 8; room for 6 + 3 x 3 = 15 rows, so 12                         slot 0   slot 1  2  nobody's

T tokens   K copies of each   N = T * K   e slots (experts in the order of their rows)   R rows, padding included
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ALL, KernelConfig, choose


@dataclass(frozen=True, kw_only=True)
class RowMaps:
    """counts_e   (e,) int64    copies of each slot
    ends_e     (e,) int32    where its padded rows end
    row_of_TK  (T, K) int64  row of token t's k-th copy
    copy_of_R  (R,) int64    copy t * K + k in each row, -1 where there is none
    """

    counts_e: Tensor
    ends_e: Tensor
    row_of_TK: Tensor
    copy_of_R: Tensor


def rows_bound(num_copies: int, num_slots: int, align: int) -> int:
    """The most rows that `num_copies` copies can take: every slot that has one may be short of a full share by align - 1 rows.

    ValueError past int32, in which grouped products count.
    """
    rows = (num_copies + min(num_slots, num_copies) * (align - 1)) // align * align
    if rows > torch.iinfo(torch.int32).max:
        raise ValueError(f"{rows} rows for one rank's experts, and grouped products count in int32: lower train.micro_batch_sequences")
    return rows


def row_maps_reference(slot_N: Tensor, num_slots: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts_e = slot_N.new_zeros(num_slots).scatter_add_(0, slot_N, torch.ones_like(slot_N))  # bincount would ask the host
    padded_e = (counts_e + align - 1) // align * align
    ends_e = padded_e.cumsum(0)
    order_N = slot_N.argsort(stable=True)
    shift_e = (ends_e - padded_e) - (counts_e.cumsum(0) - counts_e)  # padding before a slot's first row
    copies_N = torch.arange(len(slot_N), device=slot_N.device)
    row_of_N = torch.empty_like(slot_N).index_copy_(0, order_N, copies_N + shift_e[slot_N[order_N]])
    copy_of_R = slot_N.new_full((rows_bound(len(slot_N), num_slots, align),), -1).index_copy_(0, row_of_N, copies_N)
    return counts_e, ends_e.to(torch.int32), row_of_N, copy_of_R


# ---------------------------------------------------------------- Triton: one program has one slot


@triton.jit
def _count_kernel(slot_N, counts_e, N, COPIES: tl.constexpr):
    slot = tl.program_id(0)
    found = tl.zeros((COPIES,), tl.int32)
    for start in range(0, N, COPIES):
        copies = start + tl.arange(0, COPIES)
        found += (tl.load(slot_N + copies, mask=copies < N, other=-1) == slot).to(tl.int32)
    tl.store(counts_e + slot, tl.sum(found, 0).to(tl.int64))


@triton.jit
def _place_kernel(slot_N, counts_e, ends_e, row_of_N, copy_of_R, N, e, align, COPIES: tl.constexpr, SLOTS: tl.constexpr):
    slot, slots = tl.program_id(0), tl.arange(0, SLOTS)
    padded = (tl.load(counts_e + slots, mask=slots < e, other=0).to(tl.int32) + align - 1) // align * align
    row = tl.sum(tl.where(slots < slot, padded, 0), 0)
    tl.store(ends_e + slot, row + tl.sum(tl.where(slots == slot, padded, 0), 0))
    for start in range(0, N, COPIES):
        copies = start + tl.arange(0, COPIES)
        mine = tl.load(slot_N + copies, mask=copies < N, other=-1) == slot
        rows = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(row_of_N + copies, rows.to(tl.int64), mask=mine)
        tl.store(copy_of_R + rows, copies.to(tl.int64), mask=mine)
        row += tl.sum(mine.to(tl.int32), 0)


CONFIGS = (
    KernelConfig(
        kernel=_count_kernel,
        name="row_maps, counts",
        signature={"slot_N": "*i64", "counts_e": "*i64", "N": "i32:16"},
        meta={"COPIES": 2048},
        architectures=ALL,
    ),
    KernelConfig(
        kernel=_place_kernel,
        name="row_maps, rows",
        signature={"slot_N": "*i64", "counts_e": "*i64", "ends_e": "*i32", "row_of_N": "*i64", "copy_of_R": "*i64"}
        | {"N": "i32:16", "e": "i32:16", "align": "i32:16"},
        meta={"COPIES": 2048, "SLOTS": 256},
        architectures=ALL,
    ),
)


def row_maps_triton(slot_N: Tensor, num_slots: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts_e, ends_e, row_of_N, copy_of_R = out = _empty(slot_N, num_slots, align)
    copy_of_R.fill_(-1)
    count, place = choose(CONFIGS, _count_kernel).options, choose(CONFIGS, _place_kernel).options
    place["SLOTS"] = triton.next_power_of_2(num_slots)
    _count_kernel[(num_slots,)](slot_N, counts_e, len(slot_N), **count)
    _place_kernel[(num_slots,)](slot_N, counts_e, ends_e, row_of_N, copy_of_R, len(slot_N), num_slots, align, **place)
    return out


# ---------------------------------------------------------------- operator: rehearsal traces it with fake tensors


def _empty(slot_N: Tensor, num_slots: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts_e, copy_of_R = slot_N.new_empty(num_slots), slot_N.new_empty(rows_bound(len(slot_N), num_slots, align))
    return counts_e, slot_N.new_empty(num_slots, dtype=torch.int32), torch.empty_like(slot_N), copy_of_R


@torch.library.custom_op("shoestring::row_maps", mutates_args=())
def _row_maps(slot_N: Tensor, num_slots: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (row_maps_triton if slot_N.is_cuda else row_maps_reference)(slot_N, num_slots, align)


_row_maps.register_fake(_empty)


def row_maps(slot_TK: Tensor, num_slots: int, align: int) -> RowMaps:
    """int64 (T, K), each in [0, num_slots) -> the maps, on its device. T may be 0. Asks the host nothing; for errors see `rows_bound`."""
    counts_e, ends_e, row_of_N, copy_of_R = _row_maps(slot_TK.flatten(), num_slots, align)
    return RowMaps(counts_e=counts_e, ends_e=ends_e, row_of_TK=row_of_N.view_as(slot_TK), copy_of_R=copy_of_R)


def row_maps_bytes(num_copies: int, num_slots: int, align: int) -> int:
    """Slots read (once: the programs share them in cache), rows and copies written; counts and ends."""
    return 8 * (2 * num_copies + rows_bound(num_copies, num_slots, align)) + 12 * num_slots
