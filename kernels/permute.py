"""Rows gathered by an index in which -1 means "a row of zeros", and the sum of each token's copies.

T tokens   K copies of each   R rows   D model dim
"""

import torch.nn.functional as F
from torch import Tensor


def permute(x_ND: Tensor, row_of_R: Tensor) -> Tensor:
    """(N, D) or (N,) and int64 (R,) -> (R, D) or (R,): x[row_of_R], zero where the index is -1."""
    if len(x_ND) == 0:
        return x_ND.new_zeros(len(row_of_R), *x_ND.shape[1:])
    return x_ND.index_select(0, row_of_R.clamp(min=0)).index_fill_(0, (row_of_R < 0).nonzero().squeeze(1), 0)


def sum_copies_reference(rows_RD: Tensor, row_of_TK: Tensor) -> Tensor:
    return rows_RD[row_of_TK.flatten()].unflatten(0, row_of_TK.shape).sum(1)


def sum_copies(rows_RD: Tensor, row_of_TK: Tensor) -> Tensor:
    """(R, D) and int64 (T, K) -> (T, D): each token's rows added in the order of K, in FP32 or wider; BF16 is rounded at the end."""
    if len(row_of_TK) == 0:
        return rows_RD.new_zeros(0, rows_RD.shape[1])
    if rows_RD.device.type == "cpu":  # gathers and adds in one pass: five to ten times as fast
        return F.embedding_bag(row_of_TK, rows_RD, mode="sum")
    return sum_copies_reference(rows_RD, row_of_TK)
