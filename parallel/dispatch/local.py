"""Every expert is on this rank: no exchange."""

from torch import Tensor

from ...kernels.fp8_rows import Fp8Rows
from ...kernels.grouped import RowGroups
from ...kernels.permute import permute, permute_quantised, sum_copies
from ..phases import Pending
from .routing import Routing
from .wire import quantised


class LocalDispatcher:
    """Rows are gathered straight into expert order. The host learns no count, and waits for nothing."""

    def __init__(self, *, num_experts: int, align: int, fp8: bool = False):
        self.num_experts, self.align, self.fp8 = num_experts, align, fp8

    def start(self, r: Routing, slot_of_E: Tensor | None = None) -> None:
        maps = r.place(slot_of_E, self.num_experts, self.align)
        r.copy_of_R, r.groups = maps.copy_of_R, RowGroups(ends_e=maps.ends_e, align=self.align)

    def wait_counts(self, r: Routing) -> None:
        pass

    def to_experts(self, x_TD, weight_TK, r, direction):
        token_R = r.copy_of_R.div(r.expert_TK.shape[1], rounding_mode="floor")  # floor: -1 stays -1
        if self.fp8:
            rows_RD = Fp8Rows(permute_quantised(quantised(x_TD, direction), token_R), x_TD.dtype)
        else:
            rows_RD = permute(x_TD, token_R)
        weight_R = None if weight_TK is None else permute(weight_TK.flatten(), r.copy_of_R)
        return Pending(work=None, finish=lambda: (rows_RD, weight_R))

    def to_tokens(self, rows_RD, weight_R, r, direction):
        x_TD = sum_copies(rows_RD, r.row_of_TK)
        weight_TK = None if weight_R is None else weight_R[r.row_of_TK]
        return Pending(work=None, finish=lambda: (x_TD, weight_TK))
