"""What each phase of a stage takes for one micro-batch: what it keeps from forward until backward, what it hands on, and the most that is
alive beside that while it runs.

The formulas follow `train/model/`, `kernels/` and `parallel/dispatch/` where tensors are large, and leave out what is small beside them;
tests hold them against live storage. All are bytes; "beside" is beside what the phase was handed, and what phases before it keep.

T tokens   R rows of this rank's experts, padding included   M of them that came, N copies that went   D model dim   V vocabulary
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..conf.schema import ModelConfig
from ..kernels.cross_entropy import CHUNK_BYTES
from ..kernels.e5m6 import e5m6_bytes
from ..kernels.quantise import rows_bytes


class Phase(NamedTuple):
    name: str
    kept: float  # from what it is handed, too
    out: float  # handed on
    forward: float  # at most beside
    grad: float  # handed back
    backward: float
    held: float = 0.0  # by its weight gradients until they run
    running: float = 0.0  # at most beside, while they do
    rows: float = 0.0  # of `kept`, what grows with the load of this rank's experts


class Exchange(NamedTuple):
    """`packing`: beside, until it has been issued; `flight`: until it has been finished; `landing`: at most beside the flight, then.
    `onward`: likewise, until the second of two legs has been issued; 0 where there is one."""

    name: str
    packing: float
    flight: float
    landing: float
    out: float  # handed on
    adds: bool  # that is all; else beside what was there
    onward: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro-batch on one rank. `maps`: bytes that a routing keeps. `across`: rows sent and received between nodes, where tokens go by
    nodes; `once`: tokens received, where each comes once to a rank (DeepEP); `exchanged`: whether they go at all. `padded_values`: as on
    CPU, where values are widened to the keys' width."""

    model: ModelConfig
    tokens: int
    width: int  # of an activation
    fp8: bool
    recompute: frozenset[str]
    padded_values: bool
    ep: int
    rows: float  # R
    received: float  # M
    sent: float  # N
    sent_on: float  # of those that came from other nodes, and of its own, copies inside the node
    maps: float
    across: tuple[float, float] | None
    exchanged: bool
    once: float = 0.0  # H

    # ------------------------------------------------------------ sizes

    def t(self, *columns: float) -> float:
        """(T, sum of columns), as activations are."""
        return self.tokens * self.width * sum(columns)

    def r(self, *columns: float) -> float:
        return self.rows * self.width * sum(columns)

    def codes(self, columns: int) -> float:
        """Of a row as the input of a linear, or of SwiGLU before one, is kept."""
        return rows_bytes(1, columns) if self.fp8 else columns * self.width

    def product(self, *shape: float) -> float:
        """A weight's gradient before it is added to the main one, which FP32 and FP8's kernel add to in place."""
        size = float(self.width if self.width < 4 else 0)
        for n in shape:
            size *= n
        return size

    @property
    def narrow(self) -> bool:
        return self.width < 4

    @cached_property
    def wide(self) -> int:
        return max(4, self.width)

    @cached_property
    def D(self) -> float:
        return self.t(self.model.dim)

    @cached_property
    def norm(self) -> float:
        """What a norm of (T, D) takes, its output too."""
        return self.tokens * self.model.dim * self.wide * (3 if self.narrow else 2)

    @cached_property
    def norm_back(self) -> float:
        return self.tokens * self.model.dim * self.wide * 4

    # ------------------------------------------------------------ attention, and the router behind it

    def attention(self, *, routed: bool) -> Phase:
        """x -> h and u; of a routed block also weights and routing, which are small. The router has u to its own backward."""
        m, T, D, pad = self.model, self.tokens, self.D, self.padded_values
        again, lifted_again = "attention" in self.recompute, "mla_up" in self.recompute
        query, value, lift = m.num_heads * m.qk_head_dim, m.num_heads * m.v_head_dim, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
        inner = [n for n in (m.dim, m.q_lora_rank, m.kv_lora_rank) if n]
        into = (m.q_lora_rank or query) + m.kv_lora_rank + m.qk_rope_head_dim
        q, v, up = self.t(query), self.t(value), self.t(lift)
        padded, padding = (q, q) if pad else (v, 0.0)  # values, and outputs, as the core has them
        units = sum(self.codes(n) for n in inner)
        parts = self.t(into) + T * units * ("norm" not in self.recompute)
        core = 2 * q + (padded if pad else up)  # values are a view of what was lifted
        out = e5m6_bytes(T, value) if self.fp8 else padded
        small = T * self.wide * (3 + bool(m.q_lora_rank) + m.num_heads)
        unlifted = q if m.q_lora_rank else 0.0
        gate = T * (m.dim * self.wide * self.narrow + m.num_experts * self.wide) if routed else 0.0
        scores = T * (2 * m.num_experts + 2) * self.wide if routed else 0.0
        inside = parts + core * (not lifted_again) + out + small + scores
        forward = max(
            0 if self.fp8 else self.norm,
            parts + unlifted + up + 2 * q,
            parts + 2 * q + up + padding + padded + v * pad + out * self.fp8,
            inside - scores + v * pad + padded * self.fp8 + 2 * D + T * self.codes(value) * self.fp8,
            inside + D + self.norm,
            inside + 2 * D + gate + 4 * T * m.num_experts * self.wide * routed,
        )
        rows = T * self.codes(value) if self.fp8 else v * pad  # of the output's projection, made again where they are not what is kept
        gradients = T * self.codes(m.dim) * self.fp8
        # Before the core's backward: what waits. Gradients of h and u are there, but then h and u are not; nor are the scores.
        before = gate - scores + self.D * (routed and "norm" in self.recompute) + gradients + rows
        remade = core * lifted_again
        new = T * (self.codes(into) + self.codes(lift) + self.codes(query) * bool(m.q_lora_rank) + units * ("norm" in self.recompute))
        backward = max(
            gate + self.norm_back,
            before + (remade + up * pad + unlifted) * lifted_again + v,
            before + remade + (padded if pad else v) + padded * self.fp8 + 2 * q + padded,
            before - core * (not lifted_again) + 3 * q + padded + up,
            before - core * (not lifted_again) - out + new + D + (0 if self.fp8 else self.norm_back),
        )
        others = T * (self.codes(into) + self.codes(lift) + self.codes(query) * bool(m.q_lora_rank) + units)
        held = gate + gradients + rows + D * (not self.fp8)
        products = [self.product(n, o) for n, o in ((m.dim, value), (lift, m.kv_lora_rank), (query, m.q_lora_rank), (into, m.dim))]
        return Phase(
            name="attention",
            kept=D + self.maps * routed + (0 if again else inside + D + D * (routed and "norm" not in self.recompute)),
            out=D * (2 if again else 1 - (routed and "norm" not in self.recompute)),
            forward=forward,
            grad=D,
            backward=max(forward, inside + 2 * D + backward) if again else backward,
            held=held + others,
            running=max(T * max(self.codes(value), self.codes(m.dim)) if self.fp8 else max(products), self.product(m.num_experts, m.dim)),
        )

    # ------------------------------------------------------------ feed-forward

    def mlp(self) -> Phase:
        """h, u -> x of a dense block."""
        m = self.model
        inside, forward, held, backward = self._feed_forward(m.dense_hidden_dim)
        unit = self.D * ("norm" not in self.recompute or "experts" in self.recompute)
        again = "experts" in self.recompute
        return Phase(
            name="mlp",
            kept=self.D * ("attention" in self.recompute) + unit + (0 if again else inside),
            out=self.D,
            forward=forward + self.D,
            grad=2 * self.D,
            backward=max(forward, inside + backward) + self.D if again else backward + self.D,
            held=held,
            running=self._running(m.dense_hidden_dim),
        )

    def experts(self) -> Phase:
        """h, u, rows -> y and rows."""
        m, rows, again = self.model, self.rows, "experts" in self.recompute
        norm, swiglu = "norm" in self.recompute, "swiglu" in self.recompute
        F, D = m.expert_hidden_dim, m.dim
        inside, forward, held, backward = self._feed_forward(m.shared_hidden_dim) if m.num_shared_experts else (0.0, 0.0, 0.0, 0.0)
        arrived = rows * (self.codes(D) + self.wide)
        unit = self.D * ((not norm or again) - (not norm and "attention" not in self.recompute))  # the router may keep it
        if self.fp8:
            gate_up, hidden, other = rows * self.codes(2 * F), rows * self.codes(F), rows * self.codes(D)
            within = gate_up
            out = self.r(2 * F, D) + gate_up + hidden
            waits = 2 * other + hidden + gate_up
            made = other + hidden
            back, left = made + max(self.r(3 * F), self.r(2 * F, D) + gate_up), made + self.r(D)
            running = max(other, hidden)
        else:
            within = self.r(2 * F) + self.r(F) * (not swiglu)
            out = self.r(3 * F, D)
            waits = self.r(2 * D, 3 * F)
            back, left = self.r((7 + swiglu) * F), self.r(swiglu * F, D)
            experts = 1 if self.padded_values else m.num_experts // self.ep  # a CPU adds one by one
            running = self.product(experts, 2 * F, D)
        forward = max(forward + self.D, self.D + inside + out - self.D * (norm and not again))
        backward = max(back, left + backward)
        return Phase(
            name="experts",
            kept=self.D * ("attention" in self.recompute) + unit + arrived + (0 if again else inside + within),
            out=self.D + self.r(D),
            forward=forward,
            grad=2 * self.D + self.r(D) + rows * self.wide,
            backward=max(forward, inside + within + backward) if again else backward,
            held=waits + held - self.D * (not norm and not self.fp8),
            running=max(running, self._running(m.shared_hidden_dim)),
            rows=arrived + (0 if again else within),
        )

    def _feed_forward(self, hidden: int) -> tuple[float, float, float, float]:
        """Of SwiGLU between two linears over all tokens: kept, forward, held, backward. Its input is not in them."""
        T, D, w, swiglu = self.tokens, self.model.dim, self.width, "swiglu" in self.recompute
        unit = self.norm if "norm" in self.recompute else 0.0
        if self.fp8:
            kept, made = T * self.codes(2 * hidden), T * (2 * self.codes(D) + self.codes(hidden))
            forward = kept + T * (2 * hidden * w + self.codes(hidden) + D * w)
            backward = made + T * 2 * hidden * w + max(T * hidden * w, kept + max(T * D * w, unit))
            return kept, forward, made + kept, backward
        backward = max(T * w * (6 + swiglu) * hidden, T * w * (swiglu * hidden + D) + max(T * w * D, unit))
        return T * w * (2 + (not swiglu)) * hidden, T * w * (3 * hidden + D), T * w * (2 * D + 3 * hidden), backward

    def _running(self, hidden: int) -> float:
        if self.fp8:
            return self.tokens * max(self.codes(self.model.dim), self.codes(hidden))
        return self.product(2 * hidden, self.model.dim)

    # ------------------------------------------------------------ the ends

    def embed(self) -> Phase:
        return Phase("embed", kept=0.0, out=self.D, forward=self.D, grad=0.0, backward=0.0, held=self.D, running=self._looked_up)

    @property
    def _looked_up(self) -> float:
        """Gradients of an embedding's rows, widened."""
        return self.tokens * self.model.dim * self.wide * self.narrow

    def head(self) -> Phase:
        """x -> what the head reads, and its loss. Logits exist a few rows at a time, their gradient as a whole."""
        V = self.model.vocab_size
        rows = min(self.tokens, max(1, CHUNK_BYTES // (4 * V)))
        chunk = rows * V * (self.width + 4 * self.wide)
        return Phase(
            name="head",
            kept=self.t(V) + 2 * self.D,
            out=0.0,
            forward=max(self.norm, self.D + self.t(V) + chunk),
            grad=self.D,
            backward=self.D + self.norm_back,
            held=self.t(V) + self.D,
            running=self.product(V, self.model.dim) + self.D,
        )

    def predict(self) -> Phase:
        """What a head read, and the token that it was to tell -> the block's x."""
        D = self.D
        products = max(self.product(self.model.dim, 2 * self.model.dim), self._looked_up)
        return Phase(
            "predict",
            kept=3 * D,
            out=D,
            forward=2 * D + max(self.norm, 3 * D),
            grad=D,
            backward=3 * D + self.norm_back,
            held=4 * D,
            running=products,
        )

    # ------------------------------------------------------------ exchanges

    def to_experts(self, name: str, *, weights: bool) -> Exchange:
        """`weights`: of routing go along, in forward."""
        T, R = self.tokens, self.rows
        codes = self.codes(self.model.dim)
        beside = self.wide * weights
        arrived = R * (codes + beside)
        if not self.exchanged:
            return Exchange(name, packing=T * codes * self.fp8 + arrived, flight=arrived, landing=0.0, out=arrived, adds=False)
        payload = T * codes * self.fp8
        if self.once:
            H, K = self.once, self.model.top_k
            flight = payload + H * (codes + K * 12 * weights)
            placing = H * K * 8 * 4 * weights  # indices on their way to row maps
            return Exchange(
                name, max(2 * payload, flight), flight, max(placing, arrived + H * (codes - self.model.dim) * self.fp8), arrived, False
            )
        row = codes + beside
        unpacked = R * (row + codes * (weights or self.fp8) + codes * self.fp8)
        if self.across is None:
            flight = payload + (self.sent + self.received) * row
            copied = self.sent * (codes + row) * weights  # gathered, and once more beside its weights
            return Exchange(name, max(3 * payload, payload + copied, flight), flight, unpacked, arrived, False)
        out, came = self.across
        long = codes + self.model.top_k * (self.wide + 4) * weights
        flight = payload + (out + came) * long
        inside = came * codes * weights + self.sent_on * codes * weights + (self.sent_on + self.received) * row
        landing = (self.sent_on + self.received) * row + unpacked - flight
        return Exchange(name, max(3 * payload, T * long * weights + flight), flight, landing, arrived, False, inside)

    def to_tokens(self, name: str, *, weights: bool, out: float) -> Exchange:
        """Rows back, added up; what they are added to is handed on with them: `out` in all."""
        if not self.exchanged:
            return Exchange(name, packing=self.D, flight=self.D, landing=self.D, out=out, adds=True)
        plain = self.model.dim * self.width
        if self.once:
            beside = self.model.top_k * self.wide * weights
            flight = (self.once + self.tokens) * (plain + beside)
            return Exchange(name, flight + self.once * beside, flight, self.D, out, True)
        row = plain + self.wide * weights
        summed = 2 * self.D
        if self.across is None:
            copies = self.sent * plain * weights
            flight = (self.received + self.sent) * row
            return Exchange(name, max(self.received * (plain + row) * weights, flight), flight, copies + summed, out, True)
        went, came = self.across
        flight = (self.received + self.sent_on) * row
        long = plain + self.model.top_k * self.wide * weights
        onward = self.sent_on * plain * weights + (came + went) * long
        landing = (came + went) * long + went * plain * weights + summed - flight
        return Exchange(name, max(self.received * (plain + row) * weights, flight), flight, landing, out, True, onward)
