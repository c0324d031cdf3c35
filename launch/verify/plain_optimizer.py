"""The plain model's optimizer, as the papers' formulas read, on whole FP64 weights: learning rate, clip, AdamW, Muon, average."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...conf.schema import ModelConfig, OptimConfig


def learning_rate(o: OptimConfig, step: int, num_steps: int) -> float:
    """Of step 0, 1 ...: up to `lr` in `warmup_steps` equal steps, `constant_steps` of it, then down to `final_lr`, which the last step has.

    With `decay_steps`, the first step after them has it.
    """
    start = o.warmup_steps + o.constant_steps
    if step < o.warmup_steps:
        return o.lr / o.warmup_steps * (step + 1)
    if step <= start or o.decay == "none":
        return o.lr
    end = start + o.decay_steps if o.decay_steps else num_steps - 1
    done = min(1.0, (step - start) / max(1, end - start))
    return o.final_lr + (o.lr - o.final_lr) * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[o.decay]


class Optimizer:
    """`weights` are replaced by each step, never changed in place: autograd may hold on to them."""

    def __init__(self, m: ModelConfig, o: OptimConfig, weights: Mapping[str, Tensor]):
        self.m, self.o, self.steps = m, o, 0
        self.weights = dict(weights)
        self.mean = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.square = {name: torch.zeros_like(w) for name, w in weights.items() if not self.is_muon(name)}
        self.average = dict(weights) if o.ema_decay else {}

    def is_muon(self, name: str) -> bool:
        """Whether Muon updates it: matrices, but for embedding, head and gates."""
        vector = name.endswith("norm")
        return self.o.algorithm == "muon" and not vector and name not in ("embed", "head") and not name.endswith("router.weight")

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> tuple[float, float]:
        """The norm of all gradients together, and what they were multiplied with to bring it down to `clip`."""
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        coefficient = min(1.0, self.o.clip / (norm + 1e-6))
        self.steps += 1
        for name, grad in grads.items():
            change = self._muon if self.is_muon(name) else self._adam
            decay = 0.0 if name.endswith("norm") else self.o.weight_decay
            weight = self.weights[name].detach()
            self.weights[name] = weight - lr * (change(name, coefficient * grad) + decay * weight)
        d = self.o.ema_decay
        self.average = {name: d * a.detach() + (1 - d) * self.weights[name] for name, a in self.average.items()}
        return norm, coefficient

    def state(self) -> dict[str, Tensor]:
        kinds = {"master": self.weights, "exp_avg": self.mean, "exp_avg_sq": self.square, "ema": self.average}
        return {f"{name}.{kind}": t for kind, tensors in kinds.items() for name, t in tensors.items()}

    def _adam(self, name: str, grad: Tensor) -> Tensor:
        """arXiv 1412.6980, algorithm 1; the decay is decoupled from it (arXiv 1711.05101)."""
        b1, b2 = self.o.beta1, self.o.beta2
        self.mean[name] = b1 * self.mean[name] + (1 - b1) * grad
        self.square[name] = b2 * self.square[name] + (1 - b2) * grad.square()
        mean, square = self.mean[name] / (1 - b1**self.steps), self.square[name] / (1 - b2**self.steps)
        return mean / (square.sqrt() + self.o.eps)

    def _muon(self, name: str, grad: Tensor) -> Tensor:
        """arXiv 2502.16982, equations 1-4, with Nesterov momentum: of each matrix, each expert's on its own."""
        b = self.o.muon_momentum
        self.mean[name] = b * self.mean[name] + (1 - b) * grad  # what the paper has times 1 - b: no difference to what comes
        ahead = b * self.mean[name] + (1 - b) * grad
        parts = [0.2 * math.sqrt(max(x.shape[-2:])) * orthogonal(x) for x in ahead.split(self._rows(name, grad), -2)]
        return torch.cat(parts, -2)

    def _rows(self, name: str, weight: Tensor) -> list[int]:
        """Of the matrices that lie in one weight, one below another."""
        m, rows = self.m, weight.shape[-2]
        if name.endswith("gate_up"):
            return [rows // 2] * 2
        if name.endswith("qkv_a"):
            query = m.q_lora_rank or m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
            return [query, m.kv_lora_rank, m.qk_rope_head_dim]
        return [rows]


def orthogonal(x: Tensor) -> Tensor:
    """(..., rows, columns), by five of Muon's Newton-Schulz iterations; zero stays zero."""
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x
