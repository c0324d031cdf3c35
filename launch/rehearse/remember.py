"""Operators on meta tensors, run once for each set of shapes.

Torch's own versions for meta, and our operators' fakes, are Python, and take up to a millisecond to find the shape of a result; one
micro-batch after another asks for the same ones.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
_NOT_KNOWN, _INPLACE = object(), object()


class Remembered:
    """Calls `function(*args, **kwargs)`, or what stands for it in `answers`, by the operator's name.

    Remembered are results that are new tensors, no views, or the first argument itself: of plain tensors on meta, by shape, stride and
    dtype of each, and by all other arguments.
    """

    def __init__(self, answers: Mapping[str, Callable[..., Any]]):
        self.answers = answers
        self.known: dict[tuple, Any] = {}

    def __call__(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if answer := self.answers.get(name):
            return answer(*args, **kwargs)
        key = function, _key(args), _key(tuple(kwargs.items()))
        try:
            made_of = self.known.get(key, _NOT_KNOWN)
        except TypeError:  # something that has no hash
            return function(*args, **kwargs)
        if made_of is _INPLACE:
            return args[0]
        if made_of is not _NOT_KNOWN:
            return _made(made_of)
        out = function(*args, **kwargs)
        if out is not None and args and out is args[0]:
            self.known[key] = _INPLACE
        elif _new(out, {id(t.untyped_storage()) for t in _tensors((args, tuple(kwargs.values())))}):
            self.known[key] = _shape(out)
        return out


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_meta:
            return object()  # never met again
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_key(v) for v in value)
    return value if not isinstance(value, float) else (value, "float")  # 1 == 1.0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _new(out: Any, given: set[int]) -> bool:
    if isinstance(out, (tuple, list)):
        return all(_new(one, given) for one in out) and len({id(t.untyped_storage()) for t in out}) == len(out)
    fresh = type(out) is Tensor and out.is_meta and id(out.untyped_storage()) not in given
    return fresh and out.storage_offset() == 0 and out.untyped_storage().nbytes() == _bytes(out)


def _bytes(out: Tensor) -> int:
    if out.numel() == 0:
        return 0
    return out.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(out.shape, out.stride())))


def _shape(out: Any) -> Any:
    return [_shape(one) for one in out] if isinstance(out, (tuple, list)) else (out.shape, out.stride(), out.dtype)


def _made(made_of: Any) -> Any:
    if isinstance(made_of, list):
        return tuple(_made(one) for one in made_of)
    shape, stride, dtype = made_of
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)
