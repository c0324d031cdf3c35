"""Routing that no healthy router does, and routing as it was once recorded: for proofs of what must hold whatever tokens choose.

    natural       as the router chooses
    one_expert    every token to the same K experts, which sit on one rank, where its experts are enough
    idle_rank     nobody to the upper half of the experts
    alternating   samples in turn to the lower and the upper half
    ties          by scores so coarse that many are equal
    trace:FILE    as recorded: a safetensors file with layers.N (steps, samples, S, K), begun anew where it ends

K top-k   E experts   S sequence length
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...conf.errors import ConfigError, most_like
from ...conf.schema import Config
from .evidence import Choose, Evidence

FILE = "routing.safetensors"
ROUTINGS = ("natural", "one_expert", "idle_rank", "alternating", "ties")


def make(name: str, config: Config) -> Choose | None:
    """Raises ConfigError for a routing that does not exist, or a trace that does not fit the model."""
    m = config.model
    if name.startswith("trace:"):
        return replay(_read(Path(name.removeprefix("trace:")), config))
    if name not in ROUTINGS:
        raise ConfigError("routing", name, f"must be one of {', '.join(ROUTINGS)}, trace:FILE", most_like(name, ROUTINGS))
    half = max(m.top_k, m.num_experts // 2)
    away = 10.0  # from any score

    def one_expert(step, layer, samples, select, score_TE):
        return torch.arange(m.top_k).expand(len(score_TE), -1).contiguous()

    def idle_rank(step, layer, samples, select, score_TE):
        return select(score_TE - away * (torch.arange(m.num_experts) >= half))

    def alternating(step, layer, samples, select, score_TE):
        odd_T = (torch.tensor(samples) % 2 == 1).repeat_interleave(len(score_TE) // len(samples))
        upper_E = torch.arange(m.num_experts) >= m.num_experts - half
        lower_E = torch.arange(m.num_experts) < half
        return select(score_TE - away * torch.where(odd_T[:, None], ~upper_E, ~lower_E))

    def ties(step, layer, samples, select, score_TE):
        return select((score_TE * 16).round() / 16)

    return {"natural": None, "one_expert": one_expert, "idle_rank": idle_rank, "alternating": alternating, "ties": ties}[name]


def replay(trace: dict[int, Tensor]) -> Choose:
    """By layer, (steps, samples, S, K)."""

    def choose(step: int, layer: int, samples: Sequence[int], select, score_TE: Tensor) -> Tensor:
        recorded = trace[layer]
        chosen_SK = [recorded[step % len(recorded), sample % recorded.shape[1]] for sample in samples]
        return torch.cat(chosen_SK).to(score_TE.device)

    return choose


def trace_of(evidence: Evidence) -> dict[int, Tensor]:
    """What was chosen in a session, for `replay`."""
    layers = evidence.steps[0].choices if evidence.steps else {}
    return {layer: torch.stack([step.choices[layer] for step in evidence.steps]) for layer in layers}


def write(path: Path, trace: dict[int, Tensor]) -> None:
    save_file({f"layers.{layer}": chosen.contiguous() for layer, chosen in trace.items()}, path)


def _read(path: Path, config: Config) -> dict[int, Tensor]:
    m = config.model
    try:
        found = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError("routing", f"trace:{path}", f"cannot be read: {error}") from None
    trace = {}
    for layer in range(m.num_dense_layers, m.num_dense_layers + m.num_moe_layers):
        chosen = found.get(f"layers.{layer}")
        if chosen is None:
            raise ConfigError("routing", f"trace:{path}", f"has no layers.{layer}: it is the trace of a model with other layers")
        if chosen.dim() != 4 or chosen.shape[2:] != (config.data.seq_len, m.top_k) or not chosen.numel():
            wanted = f"(steps, samples, data.seq_len = {config.data.seq_len}, model.top_k = {m.top_k})"
            raise ConfigError("routing", f"trace:{path}", f"layers.{layer} is {tuple(chosen.shape)}; wanted is {wanted}")
        if chosen.is_floating_point():
            raise ConfigError("routing", f"trace:{path}", f"layers.{layer} holds {chosen.dtype}, not the numbers of experts")
        if chosen.min() < 0 or chosen.max() >= m.num_experts or (chosen.sort(-1).values.diff(dim=-1) == 0).any():
            raise ConfigError("routing", f"trace:{path}", f"layers.{layer} names experts twice, or others than 0 to {m.num_experts - 1}")
        trace[layer] = chosen.long()
    return trace
