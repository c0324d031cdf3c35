"""Tensors that are made again in backward, instead of being kept from forward until then."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class _Again:
    """Stands for the i-th of the tensors that `by` makes, where autograd would have kept it."""

    def __init__(self, i: int):
        self.i = i


@contextlib.contextmanager
def recomputed(made: Sequence[Tensor], by: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, an operation that saves one of the tensors `made` for its backward keeps only how to make it: `by()` makes them all.

    `by` runs once in backward, without gradients, and must give the same values; what its closure holds is kept, so that should be little,
    or kept anyway. Other tensors are saved as ever.
    """
    index = {_identity(tensor): i for i, tensor in enumerate(made)}
    again: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor | _Again:
        i = index.get(_identity(tensor))
        return tensor if i is None else _Again(i)

    def unpack(kept: Tensor | _Again) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        if not again:
            with torch.no_grad():
                again.extend(by())
        return again[kept.i]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def discard(tensor: Tensor) -> None:
    """Free the memory of a tensor whose values nobody will read again, though autograd still knows it by name."""
    tensor.untyped_storage().resize_(0)
