"""What a Hugging Face checkpoint of DeepSeek's says: the fields of its config.json and the names of its tensors, in both directions.

model_type deepseek_v3 is ours with sigmoid scores (DeepSeek-V3, Moonlight), deepseek_v2 with softmax scores (DeepSeek-V2-Lite).

Each of its tensors is a contiguous range of one of our weights, flattened: where we fuse (query and key-value projections, gate and up)
or stack (experts), we do so along leading dimensions.

D model dim   E experts   F hidden dim of one expert
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ...conf.rules import broken_model, get
from ...conf.schema import ModelConfig, YarnConfig
from ..checkpoint.manifest import CheckpointError
from ..model.decoder import CausalLM
from .hf_fp8 import SIDE

# fp8: linear layers are quantised, and the rest is bfloat16
STORED_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64", "fp8": "bfloat16"}
SELECTION_BIAS = "mlp.gate.e_score_correction_bias"
BLOCK = 1 << 22  # elements converted at a time


class HFError(CheckpointError):
    """A Hugging Face checkpoint that cannot be read or written faithfully; the message names the file, and the tensor or field."""


# ---------------------------------------------------------------- config.json

# ours -> theirs, where a value means the same
_FIELDS = {
    "num_layers": "num_hidden_layers", "dim": "hidden_size", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
    "num_heads": "num_attention_heads", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "num_dense_layers": "first_k_dense_replace",
    "dense_hidden_dim": "intermediate_size", "num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok", "expert_hidden_dim": "moe_intermediate_size", "num_groups": "n_group",
    "num_limited_groups": "topk_group", "norm_topk": "norm_topk_prob", "route_scale": "routed_scaling_factor", "norm_eps": "rms_norm_eps",
}  # fmt: skip

# theirs -> the values that we compute as they do; the first is what we write and what a missing field means
_SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "rope_interleave": (True, None),
    "moe_layer_freq": (1,),
}
# model_type -> the same, for the kind of router
_ROUTERS: dict[str, dict[str, tuple]] = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "deepseek_v2": {"scoring_func": ("softmax",), "topk_method": ("greedy",), "norm_topk_prob": (False, None)},
}
_MODEL_TYPES = {"sigmoid": "deepseek_v3", "softmax": "deepseek_v2"}
_ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
# As DeepSeek-V3 was released. Which scales a tensor has, its `weight_scale_inv` tells.
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [SIDE, SIDE]}
_YARN = {
    "factor": "factor", "original_max_seq_len": "original_max_position_embeddings", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
    "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
}  # fmt: skip
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
_YARN_SUPPORTED: dict[str, tuple] = {"attention_factor": (None,), "truncate": (True, None), "partial_rotary_factor": (1.0, None)}


def to_hf_config(m: ModelConfig, dtype: str, *, end_of_document: int | None = None) -> dict[str, Any]:
    """config.json of a model whose weights are stored as `dtype` (fp32, bf16, fp64 or fp8), in the fields of the released one.

    Raises HFError for a model that neither architecture computes: softmax scores with normalised weights, groups, or prediction modules.
    """
    model_type = _MODEL_TYPES[m.score_func]
    if m.score_func == "softmax" and (m.norm_topk or m.num_limited_groups < m.num_groups or m.mtp_depth):
        raise HFError(f"{model_type} (score_func = softmax) has neither norm_topk = {m.norm_topk}, nor num_limited_groups = "
                      f"{m.num_limited_groups} of {m.num_groups}, nor mtp_depth = {m.mtp_depth}: want False, all, and 0")  # fmt: skip
    config = {theirs: getattr(m, ours) for ours, theirs in _FIELDS.items()}
    config |= {name: values[0] for name, values in (_SUPPORTED | _ROUTERS[model_type]).items()}
    config |= {"quantization_config": QUANTIZATION} if dtype == "fp8" else {}
    return config | {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "q_lora_rank": m.q_lora_rank or None,
        "num_key_value_heads": m.num_heads,
        "rope_theta": m.rope_theta,
        "rope_scaling": {"type": "yarn"} | {theirs: getattr(m.yarn, ours) for ours, theirs in _YARN.items()} if m.yarn.factor > 1 else None,
        "num_nextn_predict_layers": m.mtp_depth,
        "tie_word_embeddings": m.tie_embeddings,
        "initializer_range": m.init_std,
        "dtype": STORED_DTYPES[dtype],
        "use_cache": True,
        # Given, because a missing one has a default there; and an embedding row called padding would get no gradient.
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
    }


def model_config_from_hf(config: dict[str, Any], *, name: str = "imported") -> ModelConfig:
    """The model that a config.json describes. `to_hf_config` undoes it, up to `name` and the settings of a YaRN that is off.

    Raises HFError for a size that is missing and for a field whose value asks for what this model does not compute. Fields that are
    unknown are ignored.
    """
    model_type = config.get("model_type", "deepseek_v3")
    _demand("model_type", model_type, tuple(_ROUTERS))
    for field, allowed in (_SUPPORTED | _ROUTERS[model_type]).items():
        _demand(field, config.get(field, allowed[0]), allowed)
    _check_quantization(config.get("quantization_config"))
    if model_type == "deepseek_v2":  # greedy: no groups, whatever is said of them
        config = config | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    fields = {ours: _given(config, theirs) for ours, theirs in _FIELDS.items()}
    heads = fields["num_heads"]
    _demand("num_key_value_heads", config.get("num_key_value_heads"), (heads, None))
    if "q_lora_rank" not in config:
        raise HFError("config.json: q_lora_rank is missing (null means that queries have no latent)")
    theta, yarn = _rope(config)
    m = ModelConfig(
        name=name,
        **fields,
        q_lora_rank=_count(config, "q_lora_rank"),
        score_func=next(ours for ours, theirs in _MODEL_TYPES.items() if theirs == model_type),
        mtp_depth=_count(config, "num_nextn_predict_layers"),
        rope_theta=theta,
        yarn=yarn,
        init_std=_number("initializer_range", config.get("initializer_range", 0.02)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    m.num_dense_layers = min(m.num_dense_layers, m.num_layers)
    if broken := broken_model(m):
        field, rule = broken
        raise HFError(f"config.json: {_FIELDS.get(field, field)} = {_short(get(m, field))} {rule}")
    return m.freeze()


def stored_dtype(config: dict[str, Any]) -> str:
    """fp32, bf16 or fp64: what config.json calls the dtype of its weights; fp32 where it says float16, or nothing."""
    stored = config.get("dtype") or config.get("torch_dtype")
    return next((ours for ours, theirs in STORED_DTYPES.items() if theirs == stored), "fp32")


def _given(config: dict[str, Any], field: str) -> Any:
    value, hint = config.get(field), ModelConfig.__dataclass_fields__[next(o for o, t in _FIELDS.items() if t == field)].type
    if field not in config:
        raise HFError(f"config.json: {field} is missing")
    wanted = {"int": (int,), "bool": (bool,), "float": (int, float)}[getattr(hint, "__name__", hint)]
    if float in wanted:
        return _number(field, value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise HFError(f"config.json: {field} = {_short(value)} must be a value of type {wanted[-1].__name__}")
    return value


def _count(config: dict[str, Any], field: str) -> int:
    """0 where it is null, or not given."""
    value = config.get(field) or 0
    if type(value) is not int:
        raise HFError(f"config.json: {field} = {_short(value)} must be a whole number")
    return value


def _number(field: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e30 < value < 1e30:  # no NaN, nothing that is no float
        raise HFError(f"config.json: {field} = {_short(value)} must be a number")
    return float(value)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else text[:77] + "..."


def _demand(field: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise HFError(f"config.json: {field} = {_short(value)} is not supported; supported: {', '.join(map(repr, allowed))}")


def _check_quantization(config: Any) -> None:
    if config and not isinstance(config, dict):
        raise HFError(f"config.json: quantization_config = {_short(config)} must be an object")
    for field, value in QUANTIZATION.items() if config else ():
        _demand(f"quantization_config.{field}", config.get(field), (value,) if field == "quant_method" else (value, None))


def _rope(config: dict[str, Any]) -> tuple[float, YarnConfig]:
    """From the released form (rope_theta beside rope_scaling) or that of transformers 5 (both in rope_parameters)."""
    given = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(part, dict) for part in given):
        raise HFError("config.json: rope_parameters and rope_scaling must be objects")
    rope = given[0] | given[1]
    theta = _number("rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for field, allowed in _YARN_SUPPORTED.items():
        _demand(f"rope_scaling.{field}", rope.get(field), (*allowed, None))
    _demand("rope_scaling.type", kind, ("default", "yarn"))
    if kind == "default":
        return theta, YarnConfig()
    settings = {}
    for ours, theirs in _YARN.items():
        value = rope.get(theirs)
        value = _YARN_DEFAULTS.get(ours) if value is None else value
        value = _number(f"rope_scaling.{theirs}", value)
        settings[ours] = int(value) if ours == "original_max_seq_len" else value
    return theta, YarnConfig(**settings) if settings["factor"] != 1 else YarnConfig()


# ---------------------------------------------------------------- tensors


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of a Hugging Face checkpoint: elements `offset` to `offset + numel` of our `weight`, flattened."""

    name: str
    shape: tuple[int, ...]
    weight: str
    offset: int = 0
    index: int | None = None  # where theirs is stacked: its place there
    quantised: bool = False  # in an FP8 checkpoint
    copy: bool = False  # of a weight that another piece is
    implied: bool = False  # zero, and not stored

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row_numel(self) -> int:
        """Elements of one row; of a vector, each element is a row."""
        return prod(self.shape[1:])

    @property
    def is_selection_bias(self) -> bool:
        return self.name.endswith(SELECTION_BIAS)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, `BLOCK` elements or so each: what is held in memory at once. A scale's rows stay together."""
        step = max(1, BLOCK // max(1, self.row_numel) // SIDE) * SIDE
        rows = self.shape[0] if self.numel else 0
        return ((first, min(first + step, rows)) for first in range(0, rows, step))


def weight_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our weights and selection biases, by global name; all experts in one."""
    with torch.device("meta"):
        stage = CausalLM(m).stage
    return {name: tuple(t.shape) for tensors in (stage.named_parameters(), stage.named_buffers()) for name, t in tensors}


def pieces(m: ModelConfig, *, stacked: bool = False) -> Iterator[Piece]:
    """Every tensor of the checkpoint, those of one weight next to each other, but for copies.

    `stacked`: experts as `transformers` 5 holds them in memory, and may store them: one tensor of all gates and ups, one of all downs;
    then each expert is a piece. A model without shared experts has shared tensors of no elements, because `transformers` has.
    """
    yield Piece(name="model.embed_tokens.weight", shape=(m.vocab_size, m.dim), weight="embed")
    for layer in range(m.num_blocks):
        yield from _block(m, layer, stacked)
        if layer >= m.num_layers:
            yield from _prediction(m, f"model.layers.{layer}", f"layers.{layer}")
    yield Piece(name="model.norm.weight", shape=(m.dim,), weight="norm")
    if not m.tie_embeddings:
        yield Piece(name="lm_head.weight", shape=(m.vocab_size, m.dim), weight="head")


def _block(m: ModelConfig, layer: int, stacked: bool) -> Iterator[Piece]:
    hf, ours = f"model.layers.{layer}", f"layers.{layer}"
    yield Piece(name=f"{hf}.input_layernorm.weight", shape=(m.dim,), weight=f"{ours}.attn_norm")
    yield from _attention(m, f"{hf}.self_attn", f"{ours}.attn")
    yield Piece(name=f"{hf}.post_attention_layernorm.weight", shape=(m.dim,), weight=f"{ours}.mlp_norm")
    if layer < m.num_dense_layers or not m.num_moe_layers:
        yield from _mlp(m.dim, m.dense_hidden_dim, f"{hf}.mlp", f"{ours}.mlp")
        return
    bias = f"{ours}.router.bias"
    yield Piece(name=f"{hf}.mlp.gate.weight", shape=(m.num_experts, m.dim), weight=f"{ours}.router.weight")
    yield Piece(name=f"{hf}.{SELECTION_BIAS}", shape=(m.num_experts,), weight=bias, implied=m.score_func == "softmax")
    yield from (_stacked if stacked else _experts)(m, f"{hf}.mlp.experts", f"{ours}.experts")
    yield from _mlp(m.dim, m.shared_hidden_dim, f"{hf}.mlp.shared_experts", f"{ours}.shared")


def _prediction(m: ModelConfig, hf: str, ours: str) -> Iterator[Piece]:
    """What a module of multi-token prediction has beside its block. The model's embedding and head are stored with each once more."""
    for theirs, weight in (("enorm", "embed_norm"), ("hnorm", "hidden_norm"), ("shared_head.norm", "head_norm")):
        yield Piece(name=f"{hf}.{theirs}.weight", shape=(m.dim,), weight=f"{ours}.{weight}")
    yield Piece(name=f"{hf}.eh_proj.weight", shape=(m.dim, 2 * m.dim), weight=f"{ours}.merge")
    for theirs, weight in (("embed_tokens", "embed"), ("shared_head.head", "embed" if m.tie_embeddings else "head")):
        yield Piece(name=f"{hf}.{theirs}.weight", shape=(m.vocab_size, m.dim), weight=weight, copy=True)


def _linear(name: str, rows: int, columns: int, weight: str, offset: int = 0) -> Piece:
    return Piece(name=f"{name}.weight", shape=(rows, columns), weight=weight, offset=offset, quantised=True)


def _attention(m: ModelConfig, hf: str, ours: str) -> Iterator[Piece]:
    q_width = m.num_heads * m.qk_head_dim
    rows = m.q_lora_rank or q_width
    yield _linear(f"{hf}.q_a_proj" if m.q_lora_rank else f"{hf}.q_proj", rows, m.dim, f"{ours}.qkv_a")
    yield _linear(f"{hf}.kv_a_proj_with_mqa", m.kv_lora_rank + m.qk_rope_head_dim, m.dim, f"{ours}.qkv_a", rows * m.dim)
    if m.q_lora_rank:
        yield Piece(name=f"{hf}.q_a_layernorm.weight", shape=(m.q_lora_rank,), weight=f"{ours}.q_norm")
        yield _linear(f"{hf}.q_b_proj", q_width, m.q_lora_rank, f"{ours}.q_b")
    yield Piece(name=f"{hf}.kv_a_layernorm.weight", shape=(m.kv_lora_rank,), weight=f"{ours}.kv_norm")
    yield _linear(f"{hf}.kv_b_proj", m.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank, f"{ours}.kv_b")
    yield _linear(f"{hf}.o_proj", m.dim, m.num_heads * m.v_head_dim, f"{ours}.out")


def _mlp(dim: int, hidden: int, hf: str, ours: str) -> Iterator[Piece]:
    yield _linear(f"{hf}.gate_proj", hidden, dim, f"{ours}.gate_up")
    yield _linear(f"{hf}.up_proj", hidden, dim, f"{ours}.gate_up", hidden * dim)
    yield _linear(f"{hf}.down_proj", dim, hidden, f"{ours}.down")


def _experts(m: ModelConfig, hf: str, ours: str) -> Iterator[Piece]:
    hidden, dim = m.expert_hidden_dim, m.dim
    for e in range(m.num_experts):
        start = 2 * e * hidden * dim
        yield _linear(f"{hf}.{e}.gate_proj", hidden, dim, f"{ours}.gate_up", start)
        yield _linear(f"{hf}.{e}.up_proj", hidden, dim, f"{ours}.gate_up", start + hidden * dim)
    for e in range(m.num_experts):
        yield _linear(f"{hf}.{e}.down_proj", dim, hidden, f"{ours}.down", e * hidden * dim)


def _stacked(m: ModelConfig, hf: str, ours: str) -> Iterator[Piece]:
    for name, rows, columns in (("gate_up", 2 * m.expert_hidden_dim, m.dim), ("down", m.dim, m.expert_hidden_dim)):
        for e in range(m.num_experts):
            start = e * rows * columns
            yield Piece(name=f"{hf}.{name}_proj", shape=(rows, columns), weight=f"{ours}.{name}", offset=start, index=e)
