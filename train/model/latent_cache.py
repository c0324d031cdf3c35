"""Decoding token by token with a latent cache: of each past token, a layer keeps what its keys and values are made from, and never those.

The up-projection of the keys is absorbed into the query and that of the values into the output (DeepSeek-V2 §2.1.2), so that attention
runs over the latents themselves: all heads share one key, [normed kv latent | rotated shared key], whose first part is also the value.

N new tokens   C tokens in the cache, the new ones among them   H heads   L kv latent rank   R rotary width   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.ops import Ops
from .attention import LATENT_NORM_EPS, Attention
from .decoder import CausalLM
from .rope import rotations


class CachedAttention(nn.Module):
    """Stands in for an `Attention`, whose weights it uses: its input follows, in one sequence, all that it has seen before.

    `kept` is (capacity, L + R): a row for each token, of which the first `length` are in use.
    """

    def __init__(self, attention: Attention, turns: Tensor):
        super().__init__()
        self.attention, self.turns, self.length = attention, turns, 0
        m, like = attention.m, attention.kv_b
        self.kept = torch.empty(len(turns), m.kv_lora_rank + m.qk_rope_head_dim, dtype=like.dtype, device=like.device)
        self.up_HXL = like.detach().view(m.num_heads, m.qk_nope_head_dim + m.v_head_dim, m.kv_lora_rank)

    def forward(self, x_ND: Tensor, norm_D: Tensor, _, ops: Ops) -> Tensor:
        """(N, D), normed here by `norm_D` -> (N, D). The turns that it is given are those of a sequence's begin, and not used."""
        a, m, old = self.attention, self.attention.m, self.length
        self.length = old + len(x_ND)
        turns = self.turns[old : self.length]
        parts = ops.norm_linear(x_ND, norm_D, m.norm_eps, a.qkv_a)
        q, kv, k_rope = parts.split([m.q_lora_rank or a.q_width, m.kv_lora_rank, m.qk_rope_head_dim], 1)
        if m.q_lora_rank:
            q = ops.norm_linear(q, a.q_norm, LATENT_NORM_EPS, a.q_b)
        k_rope = ops.rotate(k_rope.reshape(1, -1, 1, m.qk_rope_head_dim), turns).flatten(1).view_as(k_rope)
        self.kept[old : self.length] = torch.cat([ops.rms_norm(kv, a.kv_norm, LATENT_NORM_EPS), k_rope], 1)

        k_up_HXL, v_up_HXL = self.up_HXL.split([m.qk_nope_head_dim, m.v_head_dim], 1)
        q_nope, q_rope = q.view(1, -1, m.num_heads, m.qk_head_dim).split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
        q_HNL, q_rope_HNR = torch.einsum("nhx,hxl->hnl", q_nope[0], k_up_HXL), ops.rotate(q_rope, turns)[0].transpose(0, 1)
        mixed_HNL = self._attend(torch.cat([q_HNL, q_rope_HNR], -1))
        return ops.linear(torch.einsum("hnl,hxl->nhx", mixed_HNL, v_up_HXL).reshape(len(x_ND), -1), a.out)

    def _attend(self, q_HNK: Tensor) -> Tensor:
        """The last N tokens' queries, over latent and shared key (K = L + R), against the cache -> mixed latents (H, N, L).

        The shared key is mixed along with the latents and dropped: as wide as the keys, values need no copy, nor torch a slower kernel.
        """
        kept_HCK = self.kept[: self.length].expand(len(q_HNK), -1, -1)
        num_new = q_HNK.shape[1]
        seen_NC = torch.ones(num_new, self.length, dtype=torch.bool, device=q_HNK.device).tril(self.length - num_new)
        mixed_HNK = F.scaled_dot_product_attention(q_HNK, kept_HCK, kept_HCK, attn_mask=seen_NC, scale=self.attention.scale)
        return mixed_HNK[..., : self.attention.m.kv_lora_rank]


class Decoder:
    """One sequence through a model that it takes over, a few tokens at a time; the caches hold `capacity` tokens of all layers."""

    def __init__(self, model: CausalLM, capacity: int):
        self.model, self.capacity = model, min(capacity, model.m.max_seq_len)
        weight = model.stage.head_weight
        turns = rotations(model.m, self.capacity, weight.dtype, weight.device)
        self._caches = []
        for block in model.stage.layers.values():
            block.attn = CachedAttention(block.attn, turns)
            self._caches.append(block.attn)

    @property
    def length(self) -> int:
        return self._caches[0].length

    def rewind(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert length <= self.length
        for cache in self._caches:
            cache.length = length

    def __call__(self, tokens_N: Tensor) -> Tensor:
        """int64 (N,), the tokens that follow those given before -> logits of what comes after each, (N, V) in the weights' dtype."""
        if self.length + len(tokens_N) > self.capacity:
            raise ValueError(f"{self.length} + {len(tokens_N)} tokens: the cache has room for {self.capacity}")
        return self.model(tokens_N[None])[0]
