"""From the gate's logits to each token's experts, their weights and how many copies each expert gets (DeepSeek-V3 §2.1.2), in one pass.

Scores are sigmoids (or DeepSeek-V2's softmax) in FP32 or wider. Choice: of score + bias, in the `num_limited_groups` groups whose two
best experts add up highest, the `top_k` best; equals are taken in the order of experts. Weights: the chosen experts' scores without the
bias.

T tokens   E experts   G groups of experts   K top-k
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ALL, KernelConfig, choose


@dataclass(frozen=True, kw_only=True)
class Routes:
    """How experts are chosen. `norm_topk`: a token's weights add up to `route_scale`."""

    top_k: int
    num_groups: int = 1
    num_limited_groups: int = 1
    softmax: bool = False
    norm_topk: bool = True
    route_scale: float = 1.0


def select(score_TE: Tensor, bias_E: Tensor, routes: Routes) -> Tensor:
    """(T, K) int64, best first; of equals the first. In any floating dtype, by operations that ask the host nothing."""
    choice_TE = score_TE + bias_E
    best = lambda x, k: x.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    if routes.num_limited_groups < routes.num_groups:
        choice_TGe = choice_TE.unflatten(1, (routes.num_groups, -1))
        open_TL = best(choice_TGe.topk(2, 2).values.sum(2), routes.num_limited_groups)
        closed_TG = torch.ones_like(choice_TGe[:, :, 0], dtype=torch.bool).scatter_(1, open_TL, False)
        choice_TE = choice_TGe.masked_fill(closed_TG[:, :, None], -torch.inf).flatten(1)
    return best(choice_TE, routes.top_k)


def route_reference(logits_TE: Tensor, choose: Callable[[Tensor], Tensor], routes: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score_TE = logits_TE.softmax(1) if routes.softmax else logits_TE.sigmoid()
    expert_TK = choose(score_TE.detach())
    weight_TK = score_TE.gather(1, expert_TK)
    if routes.norm_topk:
        weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
    count_E = expert_TK.new_zeros(logits_TE.shape[1]).scatter_add_(0, expert_TK.flatten(), torch.ones_like(expert_TK).flatten())
    return weight_TK * routes.route_scale, score_TE, expert_TK, count_E


def route_backward_reference(grad_TK: Tensor, grad_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, routes: Routes) -> Tensor:
    if routes.norm_topk:
        chosen_TK = score_TE.gather(1, expert_TK)
        total_T1 = chosen_TK.sum(1, keepdim=True) + 1e-20
        grad_TK = (grad_TK - (grad_TK * chosen_TK).sum(1, keepdim=True) / total_T1) / total_T1
    grad_TE = grad_TE.scatter_add(1, expert_TK, grad_TK * routes.route_scale)
    if routes.softmax:
        return score_TE * (grad_TE - (grad_TE * score_TE).sum(1, keepdim=True))
    return grad_TE * score_TE * (1 - score_TE)


# ---------------------------------------------------------------- Triton: one program has whole tokens


@triton.jit
def _route_kernel(
    logits, bias, weight, score_out, expert, count, T, route_scale,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, LIMITED: tl.constexpr, SOFTMAX: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """WIDTH, CHOICES: E and K rounded up to a power of two."""
    tokens, cols, k_of = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, CHOICES)
    here, inside = tokens.to(tl.int64)[:, None] * E + cols[None, :], (tokens < T)[:, None] & (cols < E)[None, :]
    x = tl.load(logits + here, mask=inside, other=float("-inf"))
    if SOFTMAX:
        top = tl.where(tokens < T, tl.max(x, 1), 0.0)
        power = tl.exp(x - top[:, None])
        score = tl.math.div_rn(power, tl.where(tokens < T, tl.sum(power, 1), 1.0)[:, None])
    else:
        score = tl.sigmoid(x)
    tl.store(score_out + here, score, mask=inside)
    choice = tl.where(inside, score + tl.load(bias + cols, mask=cols < E, other=0.0)[None, :], float("-inf"))
    if LIMITED < GROUPS:
        group_of = cols // (E // GROUPS)
        rated, open_group = tl.full((TOKENS, WIDTH), float("-inf"), tl.float32), tl.zeros((TOKENS, WIDTH), tl.int32)
        for g in tl.static_range(GROUPS):
            own = tl.where((group_of == g)[None, :], choice, float("-inf"))
            first = tl.argmax(own, 1)
            second = tl.max(tl.where(cols[None, :] == first[:, None], float("-inf"), own), 1)
            rated = tl.where((cols == g)[None, :], (tl.max(own, 1) + second)[:, None], rated)  # column g: the rating of group g
        for _ in tl.static_range(LIMITED):
            best = tl.argmax(rated, 1)
            open_group += (group_of[None, :] == best[:, None]).to(tl.int32)
            rated = tl.where(cols[None, :] == best[:, None], float("-inf"), rated)
        choice = tl.where(open_group > 0, choice, float("-inf"))
    weights = tl.zeros((TOKENS, CHOICES), tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(choice, 1)
        is_best = cols[None, :] == best[:, None]
        weights = tl.where((k_of == k)[None, :], tl.sum(tl.where(is_best, score, 0.0), 1)[:, None], weights)
        tl.store(expert + tokens.to(tl.int64) * K + k, best.to(tl.int64), mask=tokens < T)
        tl.atomic_add(count + best, tl.full((TOKENS,), 1, tl.int64), mask=tokens < T)
        choice = tl.where(is_best, float("-inf"), choice)
    if NORM:
        weights = tl.math.div_rn(weights, (tl.sum(weights, 1) + 1e-20)[:, None])
    place = tokens.to(tl.int64)[:, None] * K + k_of[None, :]
    tl.store(weight + place, weights * route_scale, mask=(tokens < T)[:, None] & (k_of < K)[None, :])


@triton.jit
def _route_backward_kernel(
    grad_weight, grad_score, score, expert, grad_logits, T, route_scale,
    E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens, cols = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    here, inside = tokens.to(tl.int64)[:, None] * E + cols[None, :], (tokens < T)[:, None] & (cols < E)[None, :]
    s = tl.load(score + here, mask=inside, other=0.0)
    g = tl.zeros((TOKENS, WIDTH), tl.float32)  # of the chosen scores
    chosen = tl.zeros((TOKENS, WIDTH), tl.int1)
    for k in tl.static_range(K):
        place = tokens.to(tl.int64) * K + k
        is_kth = cols[None, :] == tl.load(expert + place, mask=tokens < T, other=-1)[:, None]
        g = tl.where(is_kth, tl.load(grad_weight + place, mask=tokens < T, other=0.0)[:, None], g)
        chosen |= is_kth
    if NORM:
        inverse = 1.0 / (tl.sum(tl.where(chosen, s, 0.0), 1) + 1e-20)
        along = tl.sum(g * s, 1) * inverse
        g = tl.where(chosen, (g - along[:, None]) * inverse[:, None], 0.0)
    g = g * route_scale + tl.load(grad_score + here, mask=inside, other=0.0)
    if SOFTMAX:
        g = s * (g - tl.sum(g * s, 1)[:, None])
    else:
        g = g * s * (1 - s)
    tl.store(grad_logits + here, g, mask=inside)


def _meta(routes: Routes, experts: int) -> dict[str, object]:
    return {"E": experts, "K": routes.top_k, "SOFTMAX": routes.softmax, "NORM": routes.norm_topk, "WIDTH": triton.next_power_of_2(experts)}


def _forward_meta(routes: Routes, experts: int) -> dict[str, object]:
    groups = {"GROUPS": routes.num_groups, "LIMITED": routes.num_limited_groups}
    return _meta(routes, experts) | groups | {"CHOICES": triton.next_power_of_2(routes.top_k)}


_FP32 = dict.fromkeys(("logits", "bias", "weight", "score_out"), "*fp32")
_GRADIENTS = dict.fromkeys(("grad_weight", "grad_score", "score", "grad_logits"), "*fp32")
_SHAPES = {  # the released models
    "DeepSeek-V3": (256, Routes(top_k=8, num_groups=8, num_limited_groups=4)),
    "DeepSeek-V2-Lite": (64, Routes(top_k=6, softmax=True, norm_topk=False)),
}
CONFIGS = (
    *(
        KernelConfig(
            kernel=_route_kernel,
            name=f"route, {name}",
            signature=_FP32 | {"expert": "*i64", "count": "*i64", "T": "i32:16", "route_scale": "fp32"},
            meta=_forward_meta(routes, experts) | {"TOKENS": 4},
            architectures=ALL,
        )
        for name, (experts, routes) in _SHAPES.items()
    ),
    *(
        KernelConfig(
            kernel=_route_backward_kernel,
            name=f"route, backward, {name}",
            signature=_GRADIENTS | {"expert": "*i64", "T": "i32:16", "route_scale": "fp32"},
            meta=_meta(routes, experts) | {"TOKENS": 2},
            architectures=ALL,
        )
        for name, (experts, routes) in _SHAPES.items()
    ),
)


def route_triton(logits_TE: Tensor, bias_E: Tensor, routes: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shape of a model is compiled into its kernel, at the first launch where it is none of the released ones."""
    weight_TK, score_TE, expert_TK, count_E = out = _empty(logits_TE, routes.top_k)
    count_E.zero_()
    tokens, experts = logits_TE.shape
    options = choose(CONFIGS, _route_kernel).options | _forward_meta(routes, experts)
    if tokens:
        args = (logits_TE, bias_E, weight_TK, score_TE, expert_TK, count_E, tokens, routes.route_scale)
        _route_kernel[(triton.cdiv(tokens, options["TOKENS"]),)](*args, **options)
    return out


def route_backward_triton(grad_TK: Tensor, grad_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, routes: Routes) -> Tensor:
    grad_logits_TE, (tokens, experts) = torch.empty_like(score_TE), score_TE.shape
    options = choose(CONFIGS, _route_backward_kernel).options | _meta(routes, experts)
    if tokens:
        args = (grad_TK, grad_TE, score_TE, expert_TK, grad_logits_TE, tokens, routes.route_scale)
        _route_backward_kernel[(triton.cdiv(tokens, options["TOKENS"]),)](*args, **options)
    return grad_logits_TE


# ---------------------------------------------------------------- operators: rehearsal traces them with fake tensors


def _empty(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    long = lambda *shape: logits_TE.new_empty(shape, dtype=torch.int64)
    return logits_TE.new_empty(tokens, top_k), logits_TE.new_empty(tokens, experts), long(tokens, top_k), long(experts)


@torch.library.custom_op("shoestring::route", mutates_args=())
def _route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, num_limited: int, softmax: bool, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = {"num_groups": num_groups, "num_limited_groups": num_limited}
    routes = Routes(top_k=top_k, **groups, softmax=softmax, norm_topk=norm, route_scale=scale)
    if logits_TE.is_cuda and logits_TE.dtype == torch.float32:  # FP64 is for proofs
        return route_triton(logits_TE.contiguous(), bias_E.contiguous(), routes)
    return route_reference(logits_TE, lambda score_TE: select(score_TE, bias_E, routes), routes)


_route.register_fake(lambda logits_TE, bias_E, top_k, *_: _empty(logits_TE, top_k))


@torch.library.custom_op("shoestring::route_backward", mutates_args=())
def _route_backward(
    grad_TK: Tensor, grad_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, softmax: bool, norm: bool, scale: float
) -> Tensor:
    routes = Routes(top_k=expert_TK.shape[1], softmax=softmax, norm_topk=norm, route_scale=scale)
    if score_TE.is_cuda and score_TE.dtype == torch.float32:
        return route_backward_triton(grad_TK.contiguous(), grad_TE.contiguous(), score_TE, expert_TK, routes)
    return route_backward_reference(grad_TK, grad_TE, score_TE, expert_TK, routes)


_route_backward.register_fake(lambda grad_TK, grad_TE, score_TE, *_: torch.empty_like(score_TE))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, bias_E, routes):
        weight_TK, score_TE, expert_TK, count_E = _route(logits_TE, bias_E, *astuple(routes))
        ctx.save_for_backward(score_TE, expert_TK)
        ctx.routes = routes
        ctx.mark_non_differentiable(expert_TK, count_E)
        return weight_TK, score_TE, expert_TK, count_E

    @staticmethod
    def backward(ctx, grad_TK, grad_TE, *_):
        r = ctx.routes
        return _route_backward(grad_TK, grad_TE, *ctx.saved_tensors, r.softmax, r.norm_topk, r.route_scale), None, None


def route(
    logits_TE: Tensor, bias_E: Tensor, routes: Routes, *, choose: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, E) and (E,), FP32 or wider -> weight_TK, score_TE (both differentiable), expert_TK (best first) and count_E (copies), int64.

    T may be 0. Asks the host nothing. `choose`: score_TE -> expert_TK, for another choice than `select`'s; it is then no single pass.
    """
    if choose is not None:
        return route_reference(logits_TE, choose, routes)
    return _Route.apply(logits_TE, bias_E, routes)


# ---------------------------------------------------------------- cost


def route_bytes(tokens: int, num_experts: int, top_k: int) -> int:
    """FP32 logits in, scores out; weights and experts; bias and counts."""
    return tokens * (8 * num_experts + 12 * top_k) + 12 * num_experts


def route_backward_bytes(tokens: int, num_experts: int, top_k: int) -> int:
    """Scores, their gradient and the logits'; weights' gradient and experts."""
    return tokens * (12 * num_experts + 12 * top_k)
