"""config.json both ways: ours back from it, the released ones, through `transformers`, and what is refused."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.schema import ModelConfig, YarnConfig
from shoestring.train.interop.hf_format import HFError, model_config_from_hf, to_hf_config
from transformers import AutoConfig

SIZES = dict(
    name="imported", num_layers=3, dim=32, vocab_size=67, max_seq_len=64, num_heads=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, dense_hidden_dim=44, num_experts=8, top_k=3, expert_hidden_dim=20,
)  # fmt: skip
V3 = ModelConfig(**SIZES, num_groups=4, num_limited_groups=2, route_scale=2.5)
V2 = ModelConfig(**SIZES, score_func="softmax", norm_topk=False)

DIMS = st.integers(1, 9)
MODELS = st.builds(
    ModelConfig, name=st.just("imported"), num_layers=st.integers(4, 9), dim=DIMS, vocab_size=DIMS, max_seq_len=DIMS, num_heads=DIMS,
    q_lora_rank=st.integers(0, 9), kv_lora_rank=DIMS, qk_nope_head_dim=DIMS, qk_rope_head_dim=DIMS.map(lambda n: 2 * n), v_head_dim=DIMS,
    rope_theta=st.floats(10, 1e6), num_dense_layers=st.integers(0, 4), dense_hidden_dim=DIMS, num_experts=DIMS, top_k=DIMS,
    num_shared_experts=st.integers(0, 3), expert_hidden_dim=DIMS, num_groups=DIMS, num_limited_groups=DIMS, norm_topk=st.booleans(),
    route_scale=st.floats(0.1, 9), norm_eps=st.sampled_from([1e-6, 1e-5]), init_std=st.floats(1e-3, 1), tie_embeddings=st.booleans(),
    yarn=st.just(YarnConfig()) | st.builds(
        YarnConfig, factor=st.floats(1.5, 40), original_max_seq_len=st.integers(1, 9999), beta_fast=st.floats(2, 40),
        beta_slow=st.floats(0.5, 1.5), mscale=st.floats(0, 2), mscale_all_dim=st.floats(0, 2),
    ), mtp_depth=st.integers(0, 2),
)  # fmt: skip


def in_groups(m: ModelConfig) -> ModelConfig:
    """Whole groups of at least two experts, of which a token can reach as many as it wants."""
    experts, limited = m.num_groups * (1 + m.num_experts), min(m.num_limited_groups, m.num_groups)
    return dataclasses.replace(
        m, num_experts=experts, num_limited_groups=limited, top_k=min(m.top_k, experts // m.num_groups * limited)
    )


MODELS = MODELS.map(in_groups)
SOFTMAX = dict(score_func="softmax", norm_topk=False, num_groups=1, num_limited_groups=1, mtp_depth=0)
MODELS |= MODELS.map(lambda m: dataclasses.replace(m, **SOFTMAX))


@given(m=MODELS, dtype=st.sampled_from(["fp32", "bf16", "fp64", "fp8"]))
def test_config_round_trip(m, dtype):
    config = json.loads(json.dumps(to_hf_config(m, dtype)))
    assert model_config_from_hf(config) == m


@settings(max_examples=30, deadline=None)
@given(m=MODELS)
def test_config_round_trip_through_transformers(m):
    if m.score_func == "softmax":
        m = dataclasses.replace(m, dim=m.dim * m.num_heads)  # asked for there
    kept = AutoConfig.for_model(**to_hf_config(m, "bf16")).to_dict()
    assert model_config_from_hf(kept) == m


# Of the three config.json as released, what says something about the model.
RELEASED = {
    "deepseek_v3": """{
      "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
      "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
      "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
      "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
      "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
      "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
      "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
      "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                                              "original_max_position_embeddings": 4096, "type": "yarn"},
      "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4,
      "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128,
      "vocab_size": 129280}""",
    "v2_lite": """{
      "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
      "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
      "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
      "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
      "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
      "num_key_value_heads": 16, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
      "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                       "original_max_position_embeddings": 4096, "type": "yarn"},
      "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false,
      "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
      "v_head_dim": 128, "vocab_size": 102400}""",
    "moonlight": """{
      "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
      "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
      "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192,
      "model_type": "deepseek_v3", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
      "n_shared_experts": 2, "norm_topk_prob": true, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
      "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
      "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": true,
      "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
      "transformers_version": "4.46.3", "use_cache": true, "v_head_dim": 128, "vocab_size": 163840}""",
}
LONG = YarnConfig(factor=40.0, original_max_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
# What a preset leaves to the run: length, the range of its first weights, prediction modules.
LEFT = {
    "deepseek_v3": dict(max_seq_len=163840, init_std=0.02, mtp_depth=1, yarn=LONG),
    "v2_lite": dict(max_seq_len=163840, init_std=0.02, yarn=dataclasses.replace(LONG, mscale=0.707, mscale_all_dim=0.707)),
    "moonlight": dict(max_seq_len=8192, init_std=0.02, yarn=YarnConfig()),
}
NOT_OURS = {
    "bos_token_id", "eos_token_id", "ep_size", "torch_dtype", "transformers_version", "aux_loss_alpha", "seq_aux",
    "num_nextn_predict_layers",
}  # fmt: skip


@pytest.mark.parametrize("preset", RELEASED)
def test_the_released_config_is_the_preset(preset):
    released = json.loads(RELEASED[preset])
    read = model_config_from_hf(released)
    assert read == dataclasses.replace(load([f"model={preset}", "optim.bias_update_speed=0"]).model, name="imported", **LEFT[preset])
    written = to_hf_config(read, "fp8" if "quantization_config" in released else "bf16")
    for field, value in released.items():
        assert field in NOT_OURS or written[field] == value, field
    assert written["num_nextn_predict_layers"] == released.get("num_nextn_predict_layers", 0)


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("rope_interleave", False, "rope_interleave = False is not supported"),
        ("attention_bias", True, "attention_bias = True"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("scoring_func", "softmax", "scoring_func = 'softmax'"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size = [64, 64]"),
        ("quantization_config", {"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2'"),
        ("topk_method", "greedy", "topk_method = 'greedy'"),
        ("moe_layer_freq", 2, "moe_layer_freq = 2"),
        ("model_type", "deepseek_v32", "model_type = 'deepseek_v32'"),
        ("num_key_value_heads", 1, "num_key_value_heads = 1"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config.quant_method = 'awq'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.type = 'linear'"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings = None must be a number"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "attention_factor": 1.2}, "rope_scaling.attention_factor = 1.2"),
        ("n_group", None, "n_group = None must be a value of type int"),
        ("hidden_size", "32", "hidden_size = '32' must be"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(field, value, part):
    with pytest.raises(HFError) as error:
        model_config_from_hf(to_hf_config(V3, "fp32") | {field: value})
    assert part in str(error.value)


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("topk_method", "group_limited_greedy", "topk_method = 'group_limited_greedy'"),
        ("norm_topk_prob", True, "norm_topk_prob = True"),
        ("scoring_func", "sigmoid", "scoring_func = 'sigmoid'"),
    ],
)
def test_a_router_of_deepseek_v2_that_is_not_greedy_is_refused(field, value, part):
    config = to_hf_config(V2, "fp32")
    with pytest.raises(HFError) as error:
        model_config_from_hf(config | {field: value})
    assert part in str(error.value)


@pytest.mark.parametrize("changes", [dict(norm_topk=True), dict(num_groups=4), dict(mtp_depth=1)])
def test_a_softmax_model_that_no_release_computes_is_not_written(changes):
    with pytest.raises(HFError, match="deepseek_v2"):
        to_hf_config(dataclasses.replace(V2, **changes), "fp32")


@pytest.mark.parametrize("field", ["hidden_size", "q_lora_rank", "n_group", "norm_topk_prob", "rms_norm_eps"])
def test_a_size_is_never_guessed(field):
    config = to_hf_config(V3, "fp32")
    del config[field]
    with pytest.raises(HFError, match=f"{field} is missing"):
        model_config_from_hf(config)
