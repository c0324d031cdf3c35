"""Seconds of one kernel and of one message, on a device and on links that reach what the cluster's file says.

A product is as fast as its precision's peak x a share x K / (K + half), x how evenly its tiles fill the SMs; or as slow as its bytes. All
else but attention takes the time of its bytes. Beside an exchange, compute has fewer SMs and a little less of each, and the exchange a part
of its links.
"""

import math
from dataclasses import dataclass

from ...conf.schema import ClusterConfig, ConfigError
from ...train.block_ops import Call

# Which share of `rates.memory` a kernel has; of those not named: "other".
MEMORY_KINDS = {
    "rms_norm": "norm", "rms_norm_quantised": "norm", "rms_norm_backward": "norm",
    "quantise_rows": "quantise", "quantise_blocks": "quantise", "quantise_columns": "columns",
    "pack_e5m6": "quantise", "unpack_e5m6": "quantise",
    "permute": "permute", "lookup": "permute", "sum_copies": "sum",
    "swiglu": "swiglu", "swiglu_quantised": "swiglu", "swiglu_backward": "swiglu",
}  # fmt: skip
PRODUCTS = {"matmul", "grouped_matmul", "add_outer", "add_grouped_outer"}  # in the linears' precision
PLAIN_PRODUCTS = {"plain_matmul", "add_plain"}  # in the weights'
GATES = {"gate", "add_gate"}  # in FP32; of BF16 on a GPU with TF32, in that


@dataclass(frozen=True, kw_only=True)
class Rates:
    """`linear`, `plain`: precisions of linears' products and of the others, as `peak_tflops` names them."""

    cluster: ClusterConfig
    linear: str
    plain: str

    # ------------------------------------------------------------ compute

    def seconds(self, call: Call, *, beside: bool) -> float:
        """`beside`: an exchange is under way."""
        r = self.cluster.rates
        if call.kernel in PRODUCTS:
            busy = self._product(call, self.linear, beside)
        elif call.kernel in PLAIN_PRODUCTS:
            busy = self._product(call, self.plain, beside)
        elif call.kernel in GATES:
            busy = self._product(call, self._gate_precision, beside)
        elif call.kernel.startswith("attention"):
            busy = self._attention(call, beside)
        else:
            busy = self.memory_seconds(call.bytes, MEMORY_KINDS.get(call.kernel, "other"))
        return busy + r.launch_us * 1e-6

    def memory_seconds(self, num_bytes: float, kind: str) -> float:
        shares = self.cluster.rates.memory
        return num_bytes / (self.cluster.memory_tb_s * 1e12 * shares.get(kind, shares.get("other", 1.0)))

    def _product(self, call: Call, precision: str, beside: bool) -> float:
        r, n = self.cluster.rates, call.matrices
        weights = call.when == "W"
        kind = f"{precision}_wgrad" if weights and f"{precision}_wgrad" in r.products else precision
        depth = call.inner / n if weights else call.inner
        height = call.rows if weights else call.rows / n
        rate = self.peak(precision) * r.products.get(kind, 1.0) * depth / (depth + r.products_half.get(kind, 0.0))
        tiles = n * math.ceil(height / r.tile) * math.ceil(call.outer / r.tile)
        sms = r.sms - r.exchange_sms if beside else r.sms
        waves = math.ceil(tiles / sms) * sms / tiles if tiles else 1.0  # of the SMs, as many as there are tiles in the last wave
        rate *= sms / r.sms * (r.compute_beside_exchange if beside else 1.0)
        return max(call.flops / rate * waves, call.bytes / (self.cluster.memory_tb_s * 1e12))

    def _attention(self, call: Call, beside: bool) -> float:
        r, part = self.cluster.rates, "backward" if call.kernel.endswith("backward") else "forward"
        share = r.attention[part] * call.inner / (call.inner + r.attention_half)
        return call.flops / (self.peak(self.plain) * share * (r.compute_beside_exchange if beside else 1.0))

    @property
    def _gate_precision(self) -> str:
        return self.plain if self.plain != "bf16" else "tf32" if "tf32" in self.cluster.peak_tflops else "fp32"

    def peak(self, precision: str) -> float:
        """FLOP/s. Raises ConfigError where the cluster's file has none."""
        peaks = self.cluster.peak_tflops
        if precision not in peaks:
            rule = f"has no peak for {precision}, which this plan's products are in"
            raise ConfigError("cluster.peak_tflops", ", ".join(peaks), f"{rule}: add cluster.peak_tflops.{precision}=TFLOPS")
        return peaks[precision] * 1e12

    # ------------------------------------------------------------ links

    def link_seconds(self, inter_bytes: float, intra_bytes: float, *, beside: bool = False) -> float:
        """Of what one rank sends at a time, over both kinds of link at once; latency included where anything is sent."""
        c, r = self.cluster, self.cluster.rates
        part = r.exchange_beside_compute if beside else 1.0
        inter = inter_bytes / (c.inter_node_gb_s * 1e9 * r.inter_node * part)
        intra = intra_bytes / (c.intra_node_gb_s * 1e9 * r.intra_node * part)
        latency = r.inter_latency_us if inter_bytes else r.intra_latency_us if intra_bytes else 0.0
        return max(inter, intra) + latency * 1e-6

    def ring_seconds(self, num_bytes: float, ranks: int, ranks_in_node: int) -> float:
        """A reduce-scatter or an all-gather of `num_bytes` over a ring: what each rank sends is all but its own share. Where several
        ranks of a node are in it, the ring crosses between nodes once for all of them."""
        if ranks < 2:
            return 0.0
        sent = num_bytes * (ranks - 1) / ranks
        if ranks <= ranks_in_node:
            return self.link_seconds(0, sent)
        return max(self.link_seconds(sent / max(1, ranks_in_node), 0), self.link_seconds(0, sent if ranks_in_node > 1 else 0))
