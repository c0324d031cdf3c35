"""What is between the matrix products and only moves memory: activations, norms, permutations, and the router."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import permute, quantise, rms_norm, router, row_maps, swiglu
from ...kernels.quantise import BLOCK, Quantised, dequantise_rows
from . import peers
from .case import CAST_DB, Case, Maker, Peer, Sizes, uses

EXACT = torch.inf
EPS = 1e-6
_wide = lambda q: [dequantise_rows(q, torch.float32)]


def cases(sizes: Sizes) -> list[Case]:
    return [*_swiglu(sizes), *_moved(sizes), _row_maps(sizes), *_norms(sizes), _route(sizes)]


# ---------------------------------------------------------------- SwiGLU


def _exact_swiglu(gate_up: Tensor, weight_R: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, 1)
    return F.silu(gate) * up * weight_R.double()[:, None]


def _swiglu(sizes: Sizes) -> list[Case]:
    R, hidden = sizes.rows, sizes.hidden
    weight = lambda maker: maker.normal(R, dtype=torch.float32).abs()
    wide = lambda q: dequantise_rows(q, torch.float64)

    def eager(gate_up: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
        q = quantise.quantise_rows_reference(swiglu.swiglu_reference(gate_up.float(), weight_R))
        return q.codes, q.scales

    def from_fp8(codes: Tensor, scales: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
        return eager(dequantise_rows(Quantised(codes, scales), torch.float32), weight_R)

    def gradients(cached: Quantised, grad: Tensor, weight_R: Tensor) -> list[Tensor]:
        leaves = [wide(cached).requires_grad_(), weight_R.double().requires_grad_()]
        with torch.enable_grad():
            out = _exact_swiglu(*leaves)
        return list(torch.autograd.grad(out, leaves, grad.double()))

    def eager_backward(codes, scales, grad, weight_R):
        return swiglu.swiglu_backward_reference(Quantised(codes, scales), grad, weight_R)

    unpacked = lambda q, *rest: (q.codes, q.scales, *rest)
    forward = lambda from_fp8_too: uses(swiglu, swiglu._swiglu_quantised_kernel, FROM_FP8=from_fp8_too, WEIGHTED=True)
    return [
        Case(
            op="swiglu and cast",
            shape=f"{R}x{2 * hidden}",
            make=lambda maker: (maker.normal(R, 2 * hidden), weight(maker)),
            run=swiglu.swiglu_quantised,
            exact=lambda gate_up, weight_R: [_exact_swiglu(gate_up, weight_R)],
            read=_wide,
            least_db=CAST_DB,
            bytes=swiglu.swiglu_quantised_bytes(R, hidden, from_fp8=False, weighted=True),
            uses=forward(False),
            peers=peers.plain_and_compiled(eager, lambda out: _wide(Quantised(*out))),
        ),
        Case(
            op="swiglu and cast from fp8",
            shape=f"{R}x{2 * hidden}",
            make=lambda maker: (quantise.quantise_rows(maker.normal(R, 2 * hidden)), weight(maker)),
            run=swiglu.swiglu_quantised,
            exact=lambda cached, weight_R: [_exact_swiglu(wide(cached), weight_R)],
            read=_wide,
            least_db=CAST_DB,
            bytes=swiglu.swiglu_quantised_bytes(R, hidden, from_fp8=True, weighted=True),
            uses=forward(True),
            peers=peers.plain_and_compiled(from_fp8, lambda out: _wide(Quantised(*out)), unpacked),
        ),
        Case(
            op="swiglu backward",
            shape=f"{R}x{2 * hidden}",
            make=lambda maker: (quantise.quantise_rows(maker.normal(R, 2 * hidden)), maker.normal(R, hidden), weight(maker)),
            run=swiglu.swiglu_backward,
            exact=gradients,
            read=list,
            least_db=45.0,
            bytes=swiglu.swiglu_backward_bytes(R, hidden, weighted=True),
            uses=uses(swiglu, swiglu._swiglu_backward_kernel, WEIGHTED=True),
            peers=peers.plain_and_compiled(eager_backward, list, unpacked),
        ),
    ]


# ---------------------------------------------------------------- rows by expert, and the router


def _slots(maker: Maker, sizes: Sizes, experts: int) -> Tensor:
    """(T, K): distinct experts for each token."""
    scores = maker.normal(sizes.tokens, experts, dtype=torch.float32)
    return scores.topk(min(sizes.top_k, experts), 1).indices


def _maps(maker: Maker, sizes: Sizes) -> row_maps.RowMaps:
    return row_maps.row_maps(_slots(maker, sizes, sizes.layer_experts), sizes.layer_experts, BLOCK)


def _moved(sizes: Sizes) -> list[Case]:
    T, D, K = sizes.tokens, sizes.dim, sizes.top_k
    rows = row_maps.rows_bound(T * K, sizes.layer_experts, BLOCK)
    token_of = lambda maker: _maps(maker, sizes).copy_of_R.div(K, rounding_mode="floor")

    def gathered(x: Tensor, row_of_R: Tensor) -> list[Tensor]:
        return [torch.where(row_of_R[:, None] < 0, 0.0, x.double()[row_of_R.clamp(min=0)])]

    def eager(x: Tensor, row_of_R: Tensor) -> Tensor:
        return torch.where(row_of_R[:, None] < 0, 0, x.index_select(0, row_of_R.clamp(min=0)))

    return [
        Case(
            op="permute bf16",
            shape=f"{T}x{D} to {rows}",
            make=lambda maker: (maker.normal(T, D), token_of(maker)),
            run=permute.permute,
            exact=gathered,
            read=lambda rows: [rows],
            least_db=EXACT,
            bytes=permute.permute_bytes(rows, D, 2),
            uses=uses(permute, permute._permute_kernel, COLS=1024),
            peers=peers.plain_and_compiled(eager, lambda rows: [rows]),
        ),
        Case(
            op="permute fp8",
            shape=f"{T}x{D} to {rows}",
            make=lambda maker: (quantise.quantise_rows(maker.normal(T, D)), token_of(maker)),
            run=permute.permute_quantised,
            exact=lambda q, row_of_R: gathered(dequantise_rows(q, torch.float32), row_of_R),
            read=_wide,
            least_db=EXACT,
            bytes=permute.permute_bytes(rows, D, 1),
            uses=uses(permute, permute._permute_kernel, COLS=2048) + uses(permute, permute._permute_scales_kernel),
        ),
        Case(
            op="sum of copies",
            shape=f"{rows} to {T}x{D}",
            make=lambda maker: (maker.normal(rows, D), _maps(maker, sizes).row_of_TK),
            run=permute.sum_copies,
            exact=lambda rows, row_of_TK: [rows.double()[row_of_TK].sum(1)],
            read=lambda out: [out],
            least_db=45.0,
            bytes=permute.sum_copies_bytes(T, K, D, 2),
            uses=uses(permute, permute._sum_copies_kernel, WEIGHTED=False),
            peers=peers.plain_and_compiled(permute.sum_copies_reference, lambda out: [out]),
        ),
    ]


def _row_maps(sizes: Sizes) -> Case:
    N, experts = sizes.tokens * sizes.top_k, sizes.layer_experts

    def exact(slot_TK: Tensor) -> list[Tensor]:
        """Expert by expert: none of the op's own steps."""
        slot_N, ends, row_of_N = slot_TK.flatten(), [], torch.zeros_like(slot_TK.flatten())
        copies = [(slot_N == e).nonzero().flatten() for e in range(experts)]
        copy_of_R = torch.full((row_maps.rows_bound(N, experts, BLOCK),), -1, device=slot_N.device)
        row = 0
        for own in copies:
            place = torch.arange(row, row + len(own), device=slot_N.device)
            row_of_N[own], copy_of_R[place] = place, own
            row += -(-len(own) // BLOCK) * BLOCK
            ends.append(row)
        counts = torch.tensor([len(own) for own in copies], device=slot_N.device)
        return [counts, torch.tensor(ends, device=slot_N.device), row_of_N.view_as(slot_TK), copy_of_R]

    return Case(
        op="row maps",
        shape=f"{sizes.tokens}x{sizes.top_k} to {experts}",
        make=lambda maker: (_slots(maker, sizes, experts),),
        run=lambda slot_TK: row_maps.row_maps(slot_TK, experts, BLOCK),
        exact=exact,
        read=lambda maps: [maps.counts_e, maps.ends_e, maps.row_of_TK, maps.copy_of_R],
        least_db=EXACT,
        bytes=row_maps.row_maps_bytes(N, experts, BLOCK),
        uses=uses(row_maps, row_maps._count_kernel) + uses(row_maps, row_maps._place_kernel),
        peers=peers.plain_and_compiled(
            lambda slot_N: row_maps.row_maps_reference(slot_N, experts, BLOCK),
            lambda out: [out[0], out[1], out[2].view(sizes.tokens, -1), out[3]],
            lambda slot_TK: (slot_TK.flatten(),),
        ),
    )


def _route(sizes: Sizes) -> Case:
    T, E, K = sizes.tokens, sizes.routed_experts, sizes.top_k
    routes = router.Routes(top_k=K, num_groups=8, num_limited_groups=4, route_scale=2.5)

    def both(choose: Callable) -> Callable:
        def run(logits_TE: Tensor, bias_E: Tensor, grad_TK: Tensor) -> list[Tensor]:
            leaf = logits_TE.detach().requires_grad_()
            with torch.enable_grad():
                weight_TK, score_TE = choose(leaf, bias_E)[:2]
            return [weight_TK.detach(), score_TE.detach(), *torch.autograd.grad(weight_TK, leaf, grad_TK)]

        return run

    def plain(logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        score_TE = logits_TE.sigmoid()
        choice_TGe = (score_TE.detach() + bias_E).unflatten(1, (routes.num_groups, -1))
        open_TL = choice_TGe.topk(2, 2).values.sum(2).topk(routes.num_limited_groups, 1).indices
        closed_TG = torch.ones_like(choice_TGe[:, :, 0], dtype=torch.bool).scatter(1, open_TL, False)
        expert_TK = choice_TGe.masked_fill(closed_TG[:, :, None], -torch.inf).flatten(1).topk(K, 1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        return weight_TK / weight_TK.sum(1, keepdim=True) * routes.route_scale, score_TE

    return Case(
        op="route and backward",
        shape=f"{T}x{E} top {K}",
        make=lambda maker: (
            maker.normal(T, E, dtype=torch.float32),
            torch.zeros(E, device=maker.device),
            maker.normal(T, K, dtype=torch.float32),
        ),
        run=both(lambda logits, bias: router.route(logits, bias, routes)),
        exact=lambda logits, bias, grad: both(plain)(logits.double(), bias.double(), grad.double()),
        read=list,
        least_db=60.0,
        bytes=router.route_bytes(T, E, K) + router.route_backward_bytes(T, E, K),
        uses=uses(router, router._route_kernel, E=256) + uses(router, router._route_backward_kernel, E=256),
        peers=tuple(Peer(name=p.name, run=both(p.run), read=list) for p in peers.plain_and_compiled(plain, list)),
    )


# ---------------------------------------------------------------- norms


def _norms(sizes: Sizes) -> list[Case]:
    return [*(_norm_and_cast(sizes.tokens, dim) for dim in (sizes.dim, sizes.latent)), _norm(sizes)]


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()


def _norm_and_cast(T: int, D: int) -> Case:
    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        q = quantise.quantise_rows_reference(rms_norm.rms_norm_reference(x.float(), weight, EPS))
        return q.codes, q.scales

    return Case(
        op="norm and cast",
        shape=f"{T}x{D}",
        make=lambda maker: (maker.normal(T, D), maker.normal(D)),
        run=lambda x, weight: rms_norm.rms_norm_quantised(x, weight, EPS)[0],
        exact=lambda x, weight: [_exact_norm(x, weight)],
        read=_wide,
        least_db=CAST_DB,
        bytes=rms_norm.rms_norm_quantised_bytes(T, D),
        uses=uses(rms_norm, rms_norm._rms_norm_quantised_kernel, POWER_OF_TWO=False, BLOCKS=4 if D <= 512 else 64),
        peers=peers.plain_and_compiled(eager, lambda out: _wide(Quantised(*out))),
    )


def _norm(sizes: Sizes) -> Case:
    """Forward and backward, as `precision=bf16` has it, compiled on a GPU."""
    T, D = sizes.tokens, sizes.dim

    def both(norm: Callable) -> Callable:
        def run(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
            leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            with torch.enable_grad():
                out = norm(*leaves)
            return [out, *torch.autograd.grad(out, leaves, grad)]

        return run

    return Case(
        op="norm and backward",
        shape=f"{T}x{D}",
        make=lambda maker: (maker.normal(T, D), maker.normal(D), maker.normal(T, D)),
        run=both(lambda x, weight: rms_norm.rms_norm(x, weight, EPS, compiled=x.is_cuda)),
        exact=lambda x, weight, grad: both(_exact_norm)(x.double(), weight.double(), grad.double()),
        read=list,
        least_db=40.0,
        bytes=10 * T * D + 6 * D,
        peers=(
            Peer(name="plain torch", run=both(lambda x, weight: rms_norm.rms_norm_reference(x, weight, EPS)), read=list),
            Peer(name="torch's rms_norm", run=both(lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)), read=list),
        ),
    )
