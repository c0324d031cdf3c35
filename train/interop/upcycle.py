"""Upcycling (arXiv 2212.05055): a mixture of experts that starts as a trained dense model of the same depth and width.

With n = dense hidden dim / expert hidden dim, each expert is one of n slices of its block's dense MLP: all hidden units for n = 1, a
copy. Expert e has slice e mod n, and shared experts have slices 0, 1, ... in turn. Only down-projections are scaled. The router is new.

    dense MLP      [ slice 0 | slice 1 ]                                n = 2
    experts        0: slice 0   1: slice 1   2: slice 0   3: slice 1    ...
    router rows    [    a    ]  [    a    ]  [    b    ]  [    b    ]   a copy's slices are chosen together (arXiv 2410.07524)

What the first forward equals. Router rows are shared so where n divides top_k and the experts of a group: then a token's top_k experts
are whole copies of the dense MLP, weighted alike inside a copy. If their weights sum to `route_scale` (norm_topk), the logits are the
dense model's but for rounding, with any number of shared experts; of copies (n = 1) that holds for any top_k, and with route_scale 1
and no shared expert nothing is even scaled. Without norm_topk, weights are counted as those of a router that knows nothing, and it
holds about; so it does where n does not divide top_k, when each token gets top_k of n slices, whose sum is right on average.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...conf.schema import ModelConfig
from ..checkpoint.trust import Trust
from ..model.decoder import initial_weight
from .hf import read_rows, tell, write_model
from .hf_checkpoint import CheckpointWeights, Rows, trusted_checkpoint, trusted_folder, write_first
from .hf_files import HFFolder, NewFolder, matched
from .hf_format import HFError, Piece, model_config_from_hf, pieces, stored_dtype

# What a MoE may have otherwise than the dense model that it is made from.
_FREE = {
    "name", "max_seq_len", "yarn", "init_std", "num_dense_layers", "num_experts", "num_shared_experts", "top_k", "expert_hidden_dim",
    "num_groups", "num_limited_groups", "norm_topk", "route_scale", "score_func",
}  # fmt: skip


def upcycle(
    source: str | Path, out: str | Path, m: ModelConfig, *, seed: int = 0, trust: Sequence[str] = (), signers: str = "",
    log: Callable[[str], None] = tell,
) -> Path:  # fmt: skip
    """Make a dense run, checkpoint, or Hugging Face folder one that the MoE `m` starts training from; returns that checkpoint.

    out/checkpoints/step_00000000   FP32 masters, zero moments: for checkpoint.resume=
    out/model/NAME.yaml             `m`: for --config-dir out model=NAME

    A source is dense where all its blocks are (first_k_dense_replace as large as num_hidden_layers). The first `m.num_dense_layers`
    blocks stay dense. `seed` draws router rows. Raises HFError where source and `m` differ in more than routing, where the expert hidden
    dim does not divide the dense one, and where `out` is not empty.
    """
    dense, precision, rows = _open(Path(source), Trust(words=tuple(trust), signers=signers), log)
    _check(dense, m, source)
    by_name = {p.name: p for p in pieces(dense)}
    read = _Upcycled(dense, m, by_name, rows, seed)
    parts = [p for p in pieces(m) if p.numel and not p.copy and not p.implied]
    with NewFolder(Path(out)) as new:
        write_model(new, m)
        made = write_first(new / "checkpoints", m, parts, read, precision=precision, layout="upcycled")
    return Path(out) / made.relative_to(new)


class _Upcycled:
    """Rows of the MoE's pieces, out of the dense model's."""

    def __init__(self, dense: ModelConfig, m: ModelConfig, by_name: dict[str, Piece], rows: Rows, seed: int):
        self.m, self._by_name, self._rows, self._seed = m, by_name, rows, seed
        self._slices = dense.dense_hidden_dim // m.expert_hidden_dim

    def __call__(self, piece: Piece, first: int, last: int) -> Tensor:
        if piece.is_selection_bias:
            return torch.zeros(last - first)
        if piece.name.endswith(".mlp.gate.weight"):
            return self._gate(piece)[first:last]
        block, found, part = piece.name.partition(".mlp.")
        if found and part.startswith("experts."):
            _, expert, projection, _ = part.split(".")
            return self._slice(f"{block}.mlp.{projection}.weight", int(expert) % self._slices, first, last, self._routed_share)
        if found and part.startswith("shared_experts."):
            return self._shared(f"{block}.mlp.{part.split('.')[1]}.weight", first, last)
        return self._rows(self._by_name[piece.name], first, last)

    def _gate(self, piece: Piece) -> Tensor:
        """One row per copy of the dense MLP where copies can be chosen whole, else one per expert."""
        rows = initial_weight(piece.weight, torch.empty(piece.shape), self.m, seed=self._seed)
        return rows[:: self._slices].repeat_interleave(self._slices, 0) if whole_copies(self.m, self._slices) else rows

    def _slice(self, name: str, index: int, first: int, last: int, share) -> Tensor:
        """Rows of slice `index` of a dense projection: of its rows, or, of a down-projection, all rows and the slice's columns."""
        size, source = self.m.expert_hidden_dim, self._by_name[name]
        if not name.endswith("down_proj.weight"):
            low = index * size
            return self._rows_at(source, low + first, low + last)
        return self._rows(source, first, last).float()[:, index * size : (index + 1) * size] * share(index)

    def _rows_at(self, source: Piece, first: int, last: int) -> Tensor:
        aligned = first // 128 * 128
        return self._rows(source, aligned, last)[first - aligned :]

    def _shared(self, name: str, first: int, last: int) -> Tensor:
        """Shared experts are one MLP, their hidden units in a row."""
        size, count = self.m.expert_hidden_dim, self.m.num_shared_experts
        if name.endswith("down_proj.weight"):
            parts = [self._slice(name, s % self._slices, first, last, self._shared_share) for s in range(count)]
            return torch.cat(parts, 1)
        spans = [(s % self._slices, max(first, s * size) - s * size, min(last, (s + 1) * size) - s * size) for s in range(count)]
        return torch.cat([self._slice(name, index, low, high, None) for index, low, high in spans if low < high])

    def _shared_share(self, index: int) -> float:
        """Of one shared copy of slice `index`, where routed experts together count as one more copy."""
        copies = sum(s % self._slices == index for s in range(self.m.num_shared_experts))
        return 1 / (copies + 1)

    def _routed_share(self, index: int) -> float:
        return self._shared_share(index) * self._slices / weight_sum(self.m)


def whole_copies(m: ModelConfig, slices: int) -> bool:
    """Whether a token's experts can be whole copies of the dense MLP."""
    return m.top_k % slices == 0 and (m.num_experts // m.num_groups) % slices == 0


def weight_sum(m: ModelConfig) -> float:
    """A token's routing weights together, where the router knows nothing: all logits 0."""
    if m.norm_topk:
        return m.route_scale
    return m.route_scale * m.top_k * (0.5 if m.score_func == "sigmoid" else 1 / m.num_experts)


def _open(source: Path, trust: Trust, log: Callable[[str], None]) -> tuple[ModelConfig, str, Rows]:
    """Model, precision and rows of a Hugging Face folder, run or checkpoint."""
    if (source / "config.json").is_file():
        folder = HFFolder(trusted_folder(source, trust, log))
        m = model_config_from_hf(folder.config)
        matched(folder, m)
        return m, stored_dtype(folder.config), folder.read
    weights = CheckpointWeights(trusted_checkpoint(source, trust, log)[0])
    return weights.m, weights.precision, lambda piece, first, last: read_rows(weights, piece, first, last)


def _check(dense: ModelConfig, m: ModelConfig, source: str | Path) -> None:
    if dense.num_moe_layers:
        raise HFError(f"{source}: is a mixture of experts already, {dense.num_moe_layers} of its blocks are")
    if not m.num_moe_layers:
        raise HFError(f"model {m.name} has no MoE block: nothing to upcycle to")
    fields = [f.name for f in dataclasses.fields(m) if f.name not in _FREE]
    if differ := [f"{f} {getattr(m, f)} (there {getattr(dense, f)})" for f in fields if getattr(dense, f) != getattr(m, f)]:
        raise HFError(f"model {m.name} differs from {source} in more than routing: {', '.join(differ)}")
    if dense.dense_hidden_dim % m.expert_hidden_dim:
        raise HFError(
            f"expert_hidden_dim = {m.expert_hidden_dim} does not divide the dense hidden dim of {source}, {dense.dense_hidden_dim}"
        )
