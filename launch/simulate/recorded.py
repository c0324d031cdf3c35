"""How unevenly a run's tokens chose experts, as it recorded them: what a plan has instead of a guessed imbalance.

    routing.safetensors   of `shoestring verify`: layers.N (steps, samples, S, K), the experts of each token
    metrics.jsonl         of a training run: `expert_load` of each record, (MoE layers, experts), of a step's whole batch

L MoE layers   E experts   N samples, or one for a whole batch   K top-k   S sequence length
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...conf.schema import Config, ConfigError, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """`counts`: (steps, N, L, E) int64, copies of tokens that went to each expert."""

    path: Path
    counts: Tensor

    def busiest(self, ep: int, samples: int) -> Tensor:
        """(steps, L) FP64: rows of the busiest of `ep` ranks over the mean, in exchanges of so many samples each (or of all there are,
        where there are fewer); the mean over a step's exchanges."""
        there = self.counts.shape[1]
        size = min(samples, there)
        exchanges = self.counts[:, : there // size * size].unflatten(1, (-1, size)).sum(2)
        rows = exchanges.unflatten(-1, (ep, -1)).sum(-1).double()
        return (rows.amax(-1) / rows.mean(-1)).mean(1)

    def spread(self, config: Config) -> tuple[tuple[float, ...], ...]:
        """Of each MoE layer the least, the mean and the most over steps, in this layout."""
        steps = self.busiest(config.parallel.ep, config.parallel.ep * config.train.micro_batch_sequences)
        return tuple(tuple(values.tolist()) for values in (steps.amin(0), steps.mean(0), steps.amax(0)))


def read(path: Path, m: ModelConfig) -> Recorded:
    """Raises ConfigError for a file that is none, or of a model with other layers or experts."""
    counts = _loads(path) if path.suffix == ".jsonl" else _choices(path, m)
    layers, experts = counts.shape[2:]
    if (layers, experts) != (m.num_moe_layers, m.num_experts):
        rule = f"has {layers} MoE layers of {experts} experts, and {m.name} has {m.num_moe_layers} of {m.num_experts}"
        raise ConfigError("routing", str(path), rule)
    return Recorded(path=path, counts=counts)


def _choices(path: Path, m: ModelConfig) -> Tensor:
    try:
        found = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError("routing", str(path), f"cannot be read: {error}") from None
    names = [f"layers.{n}" for n in range(m.num_dense_layers, m.num_dense_layers + m.num_moe_layers)]
    if sorted(found) != sorted(names):
        there = f"{len(found)} layers ({', '.join(sorted(found)[:4])} ...)"
        raise ConfigError("routing", str(path), f"holds {there}, and {m.name} has {len(names)} ({', '.join(names[:4])} ...)")
    shapes = {tuple(chosen.shape) for chosen in found.values()}
    steps, samples, length, top_k = next(iter(shapes)) if len(shapes) == 1 and all(len(s) == 4 for s in shapes) else (0, 0, 0, 0)
    if not steps * samples * length or top_k != m.top_k:
        wanted = f"all must be (steps, samples, sequence length, model.top_k = {m.top_k})"
        raise ConfigError("routing", str(path), f"layers are {', '.join(map(str, shapes))}: {wanted}")
    if any(chosen.is_floating_point() or chosen.min() < 0 or chosen.max() >= m.num_experts for chosen in found.values()):
        raise ConfigError("routing", str(path), f"names others than the {m.num_experts} experts of {m.name}")
    count = lambda chosen: torch.nn.functional.one_hot(chosen.long(), m.num_experts).sum((-3, -2))
    return torch.stack([torch.stack([count(step) for step in found[name]]) for name in names], 2)


def _loads(path: Path) -> Tensor:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        counts = torch.tensor([record["expert_load"] for record in records if record.get("expert_load")], dtype=torch.int64)
    except OSError as error:
        raise ConfigError("routing", str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError):  # RuntimeError: torch's for odd shapes
        counts = torch.zeros(0)
    if counts.dim() != 3 or not counts.numel():
        raise ConfigError("routing", str(path), "has no expert_load: it is no metrics.jsonl of a run with experts")
    return counts[:, None]
