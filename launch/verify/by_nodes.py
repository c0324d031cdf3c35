"""One process that adds up and rounds as many do: where copies of a token return node by node (`hierarchical`), each node's sum is rounded.

T tokens   K top-k   D model dim   R rows
"""

import torch
from torch import Tensor

from ...conf.schema import Config
from ...parallel.dispatch import Dispatcher
from ...parallel.dispatch.local import LocalDispatcher
from ...parallel.phases import Pending


def nodes_of(config: Config) -> int:
    """By how many nodes this configuration adds up copies."""
    p = config.parallel
    return max(1, p.ep // config.cluster.gpus_per_node) if p.dispatcher == "hierarchical" else 1


class AddedByNodes(LocalDispatcher):
    """Experts are where they were at the beginning: in the order of nodes."""

    def __init__(self, local: Dispatcher, nodes: int):
        super().__init__(num_experts=local.num_experts, align=local.align, fp8=local.fp8)
        self.nodes = nodes

    def to_tokens(self, rows_RD: Tensor, weight_R: Tensor | None, r, direction):
        node_TK = r.expert_TK.div(self.num_experts // self.nodes, rounding_mode="floor")
        copies_TKD = rows_RD[r.row_of_TK].float()
        of_node = lambda node: copies_TKD.mul((node_TK == node)[:, :, None]).sum(1).to(rows_RD.dtype)
        x_TD = torch.stack([of_node(node).float() for node in range(self.nodes)]).sum(0).to(rows_RD.dtype)
        weight_TK = None if weight_R is None else weight_R[r.row_of_TK]
        return Pending(work=None, finish=lambda: (x_TD, weight_TK))
