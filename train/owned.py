"""The weights of one pipeline rank as an optimizer meets them, and what of them one of their owners has: `parallel/optimizer/whole.py`
without tensors.

Pure functions of the configuration. Names, shapes and order are those of `model/decoder.py`; tests hold them against it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..conf.schema import Config, ModelConfig
from ..parallel.optimizer.updates import BLOCK, MATRICES
from ..parallel.optimizer.whole import range_cuts
from . import cost
from .rank_share import Share, is_routed

Matrices = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """`group`: of its replicas, "dense", "expert" or "embedding". `matrices`: (rows, columns) of those that a unit holds, under Muon."""

    name: str
    shape: tuple[int, ...]
    stage: int
    group: str
    matrices: Matrices

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an owner has of one weight."""

    numel: int
    decay: bool
    matrices: Matrices


@dataclass(frozen=True, kw_only=True)
class Owned:
    """`numel`: of all ranges, what fills them up included."""

    numel: int
    pieces: tuple[Piece, ...]

    @property
    def numel_by_muon(self) -> int:
        return sum(piece.numel for piece in self.pieces if piece.matrices)


def weights(config: Config, share: Share) -> Iterator[Weight]:
    """Of all stages of the pipeline rank, in their order."""
    m, last, by_muon = config.model, share.num_stages - 1, config.optim.algorithm == "muon"
    one_table = share.has_first and share.has_last  # of two stages, the first one's
    for stage, layers in share.stages.items():
        for name, *shape in _of_stage(
            m, layers, embed=stage == 0 or (stage == last and m.embeds_at_head and not one_table), head=stage == last
        ):
            group = "expert" if ".experts." in name else "embedding" if name == "embed" and m.embeds_at_head and share.ends else "dense"
            shape = (shape[0] // config.parallel.ep, *shape[1:]) if group == "expert" else tuple(shape)
            yield Weight(name=name, shape=shape, stage=stage, group=group, matrices=muon_matrices(m, name, shape) if by_muon else ())


def _of_stage(m: ModelConfig, layers: Sequence[int], *, embed: bool, head: bool) -> Iterator[tuple]:
    if embed:
        yield "embed", m.vocab_size, m.dim
    if head:
        yield "norm", m.dim
        if not m.tie_embeddings:
            yield "head", m.vocab_size, m.dim
    for layer in layers:
        yield from ((f"layers.{layer}.{name}", *shape) for name, *shape in _of_block(m, layer))


def _of_block(m: ModelConfig, layer: int) -> Iterator[tuple]:
    D, queries = m.dim, m.num_heads * m.qk_head_dim
    yield from (("attn_norm", D), ("mlp_norm", D))
    if layer >= m.num_layers:
        yield from (("embed_norm", D), ("hidden_norm", D), ("head_norm", D), ("merge", D, 2 * D))
    yield "attn.qkv_a", (m.q_lora_rank or queries) + m.kv_lora_rank + m.qk_rope_head_dim, D
    if m.q_lora_rank:
        yield from (("attn.q_norm", m.q_lora_rank), ("attn.q_b", queries, m.q_lora_rank))
    yield "attn.kv_norm", m.kv_lora_rank
    yield "attn.kv_b", m.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank
    yield "attn.out", D, m.num_heads * m.v_head_dim
    if not is_routed(m, layer):
        yield from (("mlp.gate_up", 2 * m.dense_hidden_dim, D), ("mlp.down", D, m.dense_hidden_dim))
        return
    E, F = m.num_experts, m.expert_hidden_dim
    yield from (("router.weight", E, D), ("experts.gate_up", E, 2 * F, D), ("experts.down", E, D, F))
    if m.num_shared_experts:
        yield from (("shared.gate_up", 2 * m.shared_hidden_dim, D), ("shared.down", D, m.shared_hidden_dim))


def muon_matrices(m: ModelConfig, name: str, shape: Sequence[int]) -> Matrices:
    """(rows, columns) of the matrices that a weight, or each expert's, is made of; none for embedding, head, gates and norms."""
    if len(shape) == 1 or name in ("embed", "head") or name.endswith("router.weight"):
        return ()
    *_, rows, columns = shape
    parts = [rows]
    if name.endswith("gate_up"):
        parts = [rows // 2, rows // 2]
    elif name.endswith("qkv_a"):
        latents = [m.kv_lora_rank, m.qk_rope_head_dim]
        parts = [rows - sum(latents), *latents]
    return tuple((part, columns) for part in parts)


def owned(config: Config, share: Share, *, edp_rank: int, ep_rank: int) -> Owned:
    """What the rank in that place of the pipeline rank's owns."""
    own, groups = share.rank(config, share.pp_rank, edp_rank, ep_rank), share.replicas(config, ep_rank)
    buffers: dict[tuple, list[Weight]] = {}
    for w in weights(config, share):
        buffers.setdefault((w.group, w.stage, w.matrices == ()), []).append(w)
    keys = sorted(buffers, key=lambda key: (groups[key[0]], buffers[key][0].name))
    cuts = range_cuts([(groups[key[0]], [(w.numel, w.matrices) for w in buffers[key]]) for key in keys])
    numel, pieces = 0, []
    for key, borders in zip(keys, cuts):
        low, high = borders[(at := groups[key[0]].index(own))], borders[at + 1]
        numel += high - low
        ends = list(accumulate(w.numel for w in buffers[key]))
        for w, end in zip(buffers[key], ends):
            here = min(high, end) - max(low, end - w.numel)
            if here > 0:
                pieces.append(Piece(numel=here, decay=len(w.shape) > 1, matrices=w.matrices))
    return Owned(numel=numel, pieces=tuple(pieces))


def update_bytes(config: Config, mine: Owned) -> int:
    """The most that a step of the optimizer takes on the device beside its state: moments that are widened, matrices made orthogonal."""
    o, width = config.optim, cost.ELEMENT_BYTES[config.precision.compute]
    wide, narrow, most = max(4, width), cost.ELEMENT_BYTES[o.moment_precision(config.precision.compute)], 0
    if narrow < wide and not o.offload:
        for decay in (True, False):
            before = 0
            for piece in (p for p in mine.pieces if p.decay == decay and not p.matrices):
                for here in _blocks(piece.numel, BLOCK["cuda"]):  # two moments, beside those of the block before
                    most, before = max(most, 2 * wide * (before + here)), here
    product, before = 8 if width == 8 else 2, 0
    for piece in mine.pieces:
        unit = sum(rows * columns for rows, columns in piece.matrices)
        for rows, columns in piece.matrices:
            for num in _blocks(piece.numel // unit, max(1, MATRICES // (rows * columns))):
                numel, gram = num * rows * columns, num * min(rows, columns) ** 2
                widened = 0 if width == 8 else wide * numel
                most = max(most, before + product * (2 * numel + 2 * gram), before + widened + product * numel)
                before = product * numel
    return most


def _blocks(num: int, size: int) -> Iterator[int]:
    yield from [size] * (num // size)
    if num % size:
        yield num % size
