"""A cached step gives the logits of the whole sequence run at once, for every form of attention and block; and keeps only latents."""

import pytest
import torch
from shoestring.conf.schema import ModelConfig, YarnConfig
from shoestring.train.model.decoder import CausalLM, materialise
from shoestring.train.model.latent_cache import CachedAttention, Decoder


def small(**changes) -> ModelConfig:
    fields = dict(
        name="m", num_layers=3, dim=16, vocab_size=41, max_seq_len=48, num_heads=2, q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, num_dense_layers=1, dense_hidden_dim=24, num_experts=8, num_shared_experts=1, top_k=3,
        expert_hidden_dim=8, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.3,
    )  # fmt: skip
    return ModelConfig(**(fields | changes)).freeze()


def build(m: ModelConfig, dtype: torch.dtype) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(m, dtype)
    materialise(model.stage, seed=0)
    for name, weight in model.stage.named_parameters():
        if name.endswith("norm"):  # initial ones would hide a norm that is left out
            weight.detach().uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


YARN = YarnConfig(factor=4.0, original_max_seq_len=12, mscale=0.7, mscale_all_dim=1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # a latent for queries; one dense block, two of experts
        {"q_lora_rank": 0},
        {"yarn": YARN},
        {"num_dense_layers": 3, "tie_embeddings": True},  # no routing at all
        {"num_dense_layers": 0, "q_lora_rank": 0, "yarn": YARN, "num_shared_experts": 0},
        {"num_heads": 1, "v_head_dim": 16},  # values wider than keys
    ],
    ids=str,
)
def test_steps_equal_the_whole(changes, dtype, tolerance):
    m = small(**changes)
    tokens = torch.randint(0, m.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    whole = build(m, dtype)(tokens[None])[0]
    decoder = Decoder(build(m, dtype), 48)
    steps = torch.cat([decoder(part) for part in tokens.split([11, 1, 5, *[1] * 31])])  # a prompt, one token, several, then one by one
    assert whole.std() > 0.3
    assert (steps - whole).abs().max() < tolerance * max(1.0, whole.abs().max())


def test_only_latents_and_the_shared_key_are_kept():
    m = small()
    decoder = Decoder(build(m, torch.float32), 20)
    decoder(torch.arange(20))
    held = {name for cache in decoder._caches for name, value in vars(cache).items() if isinstance(value, torch.Tensor)}
    assert held == {"kept", "turns", "up_HXL"}
    for cache in decoder._caches:
        assert isinstance(cache, CachedAttention) and cache.kept.shape == (20, m.kv_lora_rank + m.qk_rope_head_dim)
        assert cache.up_HXL.data_ptr() == cache.attention.kv_b.data_ptr()  # a view of the weight
        assert cache.turns is decoder._caches[0].turns


def test_rewound_decoders_have_forgotten():
    decoder, fresh = (Decoder(build(small(), torch.float64), 30) for _ in range(2))
    decoder(torch.arange(10))
    decoder(torch.arange(20, 35))
    decoder.rewind(10)
    fresh(torch.arange(10))
    assert decoder.length == 10 and torch.equal(decoder(torch.tensor([3, 4])), fresh(torch.tensor([3, 4])))


def test_a_full_cache_says_so():
    decoder = Decoder(build(small(), torch.float32), 8)
    decoder(torch.arange(6))
    with pytest.raises(ValueError, match=r"6 \+ 3 tokens: the cache has room for 8"):
        decoder(torch.arange(3))
    assert Decoder(build(small(), torch.float32), 1000).capacity == 48
