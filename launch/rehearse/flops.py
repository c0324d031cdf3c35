"""FLOPs of what torch dispatches: matrix products and attention. A multiply and an add are two.

Attention is causal: position i sees i + 1 keys. Its backward multiplies five times where forward does twice: scores again, and the
gradients of probabilities, values, queries and keys. Of experts' rows those count that are in the product, as `Used` says: a buffer may
have room for more.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.utils.flop_counter import flop_registry

Used = Mapping[int, int]  # rows of a buffer for experts -> rows of them in products


def flops_of(name: str, packet: object, args: tuple, kwargs: dict, out: object, used: Used) -> int:
    """Of one call of an operator, such as "aten.mm"."""
    if own := _OWN.get(name):
        return own(args, used)
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _addmm(args: tuple, used: Used) -> int:
    _, a, b = args[:3]
    return 2 * len(a) * a.shape[1] * b.shape[1]


def _grouped(args: tuple, used: Used) -> int:
    """Rows times experts' matrices (R, I) (e, I, O), or their gradient (O, R) (R, I)."""
    a, b = args[:2]
    rows = used.get(len(a), len(a)) if b.dim() == 3 else len(a)
    inner = a.shape[1] if b.dim() == 3 else used.get(a.shape[1], a.shape[1])
    return 2 * rows * inner * b.shape[-1]


def _fp8_grouped(args: tuple, used: Used) -> int:
    a, _, b = args[:3]
    return 2 * used.get(len(a), len(a)) * a.shape[1] * b.shape[1]


def _fp8_grouped_outer(args: tuple, used: Used) -> int:
    main, a = args[:2]
    return 2 * main.shape[1] * main.shape[2] * used.get(a.shape[1], a.shape[1])


def _pairs(q: Tensor) -> int:
    """Of a query and a key that it sees, of all heads."""
    return math.prod(q.shape[:3]) * (q.shape[2] + 1) // 2


def _attention(args: tuple, used: Used) -> int:
    q, _, v = args[:3]
    return 2 * _pairs(q) * (q.shape[3] + v.shape[3])


def _attention_backward(args: tuple, used: Used) -> int:
    _, q, _, v = args[:4]
    return 2 * _pairs(q) * (3 * q.shape[3] + 2 * v.shape[3])


_OWN: dict[str, Callable[[tuple, Used], int]] = {
    "aten.addmm_": _addmm,
    "aten._grouped_mm": _grouped,
    "shoestring.fp8_grouped_matmul": _fp8_grouped,
    "shoestring.add_fp8_grouped_outer": _fp8_grouped_outer,
}
for _kernel in ("cudnn_attention", "flash_attention_for_cpu"):
    _OWN[f"aten._scaled_dot_product_{_kernel}"] = _attention
    _OWN[f"aten._scaled_dot_product_{_kernel}_backward"] = _attention_backward
