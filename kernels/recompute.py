"""Tensors that are made again in backward, instead of being kept from forward until then."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Again:
    """Stands where autograd would have kept a tensor."""

    make: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Output:
    """An operation's output, which it saves for its own backward, is `by()` there. It is known by its shape: while it is being saved,
    nobody has seen it yet."""

    shape: torch.Size
    by: Callable[[], Tensor]


@contextlib.contextmanager
def recomputed(
    inputs: Sequence[Tensor], *, by: Callable[[], Sequence[Tensor]] | None = None, output: Output | None = None
) -> Iterator[None]:
    """Inside, an operation on `inputs` that saves one of them for its backward keeps only how to make it: `by()` makes them all. And
    likewise its output, where one is described. Other tensors are saved as ever.

    Both run in backward, without gradients (`by` once), and what their closures hold is kept: that should be little, or kept anyway.
    """
    index = {_identity(tensor): i for i, tensor in enumerate(inputs)}
    again: list[Tensor] = []

    def make(i: int) -> Tensor:
        if not again:
            again.extend(by())
        return again[i]

    def pack(tensor: Tensor) -> Tensor | _Again:
        i = index.get(_identity(tensor))
        if i is not None:
            return _Again(lambda: make(i)) if by else tensor
        return _Again(output.by) if output and tensor.shape == output.shape else tensor

    def unpack(kept: Tensor | _Again) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        with torch.no_grad():
            return kept.make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _identity(tensor: Tensor) -> tuple:
    """Not by address: on meta there is none. Torch keeps a storage's Python object as long as the storage."""
    return id(tensor.untyped_storage()), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def discard(tensor: Tensor) -> None:
    """Free the memory of a tensor whose values nobody will read again, though autograd still knows it by name."""
    tensor.untyped_storage().resize_(0)
