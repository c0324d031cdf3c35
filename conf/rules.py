"""The rules of a configuration that need no knowledge of schedules, dispatchers or kernels: ranges, then rules between fields.

A broken rule is a field and a sentence. What its nearest valid value is, one search answers for all of them: of the values that the
field could have in this configuration, the nearest with which the *whole* configuration is valid, else the nearest that at least
repairs this field. A run of several phases is checked phase by phase, each a configuration of its own. Rules of data, schedules and
dispatchers stand with their owners; `launch/validate.py` calls them.
"""

import copy
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

from . import places, variables
from .errors import ConfigError, divisors, most_like
from .phases import levels
from .schema import Config, ModelConfig

Broken = tuple[str, str]  # field, rule


def _fields(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


_POSITIVE = [
    *_fields("model", "num_layers dim vocab_size max_seq_len num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    *_fields("model", "dense_hidden_dim num_experts top_k expert_hidden_dim num_groups num_limited_groups"),
    *_fields("model", "rope_theta norm_eps route_scale yarn.original_max_seq_len yarn.beta_fast yarn.beta_slow"),
    *_fields("parallel", "pp edp ep chunks"),
    *_fields("data", "seq_len workers"),
    *_fields("optim", "lr eps clip"),
    *_fields("train", "steps global_batch_tokens micro_batch_sequences eval_sequences"),
    *_fields("checkpoint", "keep_last"),
    *_fields("guard", "window patience"),
    *_fields("cluster", "memory_gb memory_tb_s gpus_per_node intra_node_gb_s inter_node_gb_s mttf_gpu_hours checkpoint_gb_s"),
    *_fields("cluster.rates", "tile sms compute_beside_exchange exchange_beside_compute intra_node inter_node"),
    *_fields("launch", "threads timeout_s log_interval port slurm.signal_s k8s.shm_gb k8s.grace_s alerts.window"),
    *_fields("stack", "tensor context"),
    "precision.sentinel_max_error",
]
_NOT_NEGATIVE = [
    *_fields("model", "num_dense_layers num_shared_experts q_lora_rank init_std mtp_depth yarn.mscale yarn.mscale_all_dim"),
    *_fields("optim", "final_lr warmup_steps constant_steps decay_steps weight_decay"),
    *_fields("optim", "bias_update_speed sequence_balance_coef z_loss_coef mtp_weight"),
    *_fields("train", "tokens ramp.tokens ramp.start_tokens ramp.increment_tokens eval_interval stop_after seed"),
    "parallel.placement_interval", "parallel.comm_sms", "launch.trace_interval", "precision.sentinel_interval",
    *_fields("checkpoint", "interval interval_seconds"),
    *_fields("guard", "spike rollbacks stragglers replay_interval"), "budget_usd", "budget_gpu_hours", "max_tokens",
    *_fields("launch", "hang_s max_restarts k8s.max_restarts alerts.stall_s alerts.loss_spike alerts.max_vio alerts.disk_checkpoints"),
    "cluster.price_per_gpu_hour", "cluster.kw_per_gpu", "cluster.restart_minutes", "cluster.threads", "data.tokenizer.vocab_size",
    "stack.host_us_per_step", "stack.peer_wait",
    *_fields("cluster.rates", "attention_half launch_us exchange_sms intra_latency_us inter_latency_us"),
]  # fmt: skip
_PHASES = [*(f"{phase}_{when}" for phase in ("attention", "experts", "mlp", "embed", "head", "predict") for when in "FBW"), "exchange"]
_BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.muon_momentum", "optim.ema_decay", "data.eval_fraction", "data.max_bad_fraction",
              "launch.alerts.mfu_drop")  # fmt: skip
_CHOICES = {
    "precision.compute": ("fp32", "bf16", "fp64"),
    "precision.linear": ("compute", "fp8"),
    "model.score_func": ("sigmoid", "softmax"),
    "optim.engine": ("whole", "deepspeed"),
    "optim.algorithm": ("adamw", "muon"),
    "optim.moments": ("auto", "fp32", "bf16"),
    "optim.decay": ("cosine", "linear", "none"),
    "data.tokenizer.kind": ("bytes", "bpe", "file"),
    "launch.how": ("local", "torchrun", "slurm", "k8s"),
    "launch.device": ("auto", "cpu", "cuda"),
    "launch.wandb": ("disabled", "offline", "online"),
    "cluster.pin": ("none", "cores", "numa"),
}
_WEBHOOK = "launch.alerts.webhook"
_RECOMPUTED = ("norm", "mla_up", "swiglu", "attention", "experts")
_OF_A_PHASE = ("train", "optim", "parallel", "data.seq_len", "data.sources", "model.max_seq_len", "model.yarn")
_OF_THE_RUN = ("train.seed", "train.stop_after", "optim.ema_decay")
_NCCL_BLOCKS = 64  # of a communicator, at most (its channels)
_TRIALS = 200  # of candidates, when the nearest valid value is searched


def check(config: Config) -> None:
    """Raises ConfigError for the first broken rule; ranges of single fields come first."""
    for field, rule in _broken(config) if not config.phases else _ranges(config):
        raise ConfigError(field, _shown(field, get(config, field)), rule, _shown(field, _nearest(config, field)))
    for name, phase in config.phases.items():
        for field in _changed(config, phase):
            if field in _OF_THE_RUN or not f"{field}.".startswith(tuple(f"{part}." for part in _OF_A_PHASE)):
                rule = f"belongs to the whole run; a phase may change {', '.join(_OF_A_PHASE)}"
                shown = (_shown(field, get(c, field)) for c in (phase, config))
                raise ConfigError(f"phases.{name}.{field}", next(shown), rule, next(shown))
        if config.data.tokenizer.kind == "bpe" and _unweighted(phase) != _unweighted(config):
            rule = "may differ from the run's in weight only: data.tokenizer.kind=bpe learns its ids from them; give one as a file"
            raise ConfigError(f"phases.{name}.data.sources", ", ".join(phase.data.sources), rule, ", ".join(config.data.sources))
        for field, rule in _broken(phase):
            key = field if get(phase, field) == get(config, field) else f"phases.{name}.{field}"
            raise ConfigError(key, get(phase, field), f"{rule} (in phase {name})", _nearest(phase, field))


def broken_model(m: ModelConfig) -> Broken | None:
    """The first rule that a model breaks which somebody else describes; field without its "model."."""
    c = Config()
    c.model, c.precision.compute = m, "fp64"  # which asks nothing of dimensions
    found = next(_numbers(c, "model."), None) or next(_model(c), None)
    return (found[0].removeprefix("model."), found[1]) if found else None


def _shown(field: str, value: Any) -> Any:
    """Of environment variables the names only: one of them may hold a secret. So may a webhook's address."""
    return list(value) if field == "cluster.env" else "(hidden)" if field == _WEBHOOK and value else value


def _unweighted(config: Config) -> list:
    return [(name, dataclasses.replace(source, weight=1.0)) for name, source in config.data.sources.items()]


def _changed(run: Any, phase: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields that differ."""
    for f in dataclasses.fields(run):
        below, above = getattr(run, f.name), getattr(phase, f.name)
        if f.name == "phases" or below == above:
            continue
        if dataclasses.is_dataclass(below):
            yield from _changed(below, above, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


_of = functools.cache(operator.attrgetter)  # where no dictionary is on the way: a tenth of the time, of which a search for layouts is made


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def replaced(config: Any, key: str, value: Any) -> Any:
    """A copy of a configuration with another value at a dotted key; frozen or not like the original."""
    name, _, rest = key.partition(".")
    if isinstance(config, dict):
        return type(config)({**config, name: replaced(config[name], rest, value) if rest else value})
    result = copy.copy(config)
    object.__setattr__(result, name, replaced(getattr(config, name), rest, value) if rest else value)
    return result


# ---------------------------------------------------------------- the nearest valid value


def _nearest(config: Config, field: str) -> Any:
    value = get(config, field)
    candidates = list(_candidates(config, field))
    if isinstance(value, str):
        candidates = [most_like(value, candidates)] if candidates else []
    elif isinstance(value, (int, float)):
        at = value if math.isfinite(value) else 0
        candidates.sort(key=lambda n: (abs(n - at), n))
    trials = [(c, list(_broken(replaced(config, field, c)))) for c in candidates[:_TRIALS]]
    valid = [c for c, broken in trials if not broken]
    repaired = [c for c, broken in trials if all(name != field for name, _ in broken)]
    return next(iter(valid + repaired), None)


def _candidates(c: Config, field: str) -> Iterable:
    """Values that a field might have, as far as its own kind and its neighbours say; the search tries which of them are valid."""
    m, p, t = c.model, c.parallel, c.train
    value = get(c, field)
    if field in _CHOICES:
        return _CHOICES[field]
    if field == _WEBHOOK:
        return ["env:ALERT_WEBHOOK"]
    if field in ("name", "model.name"):
        return [places.nearest(value, parts=field == "name")] if value.strip() else []
    if field in ("parallel.ep", "model.num_groups"):
        return divisors(m.num_experts) if 0 < m.num_experts < 2**20 else [1]
    if field in ("parallel.pp", "parallel.chunks", "model.num_dense_layers"):
        return range(0, min(max(m.num_layers, 1), 4096) + 1)
    if field in ("model.num_limited_groups", "model.top_k"):
        return range(1, max(1, min(m.num_experts, 4096)) + 1)
    unit = max(1, p.dp * t.micro_batch_sequences * c.data.seq_len)
    if field == "train.global_batch_tokens":
        whole, steps = {max(1, n) * unit for n in (value // unit, value // unit + 1)}, max(1, t.ramp.increment_tokens)
        grown = max(1, (value - t.ramp.start_tokens) // steps)
        return whole | {t.ramp.start_tokens + n * steps for n in (grown, grown + 1)}
    if field == "train.ramp.start_tokens":
        full, step = t.global_batch_tokens, t.ramp.increment_tokens or unit
        return [unit, *(full - n * step for n in range(1, 1025) if full > n * step)]
    if field == "train.ramp.increment_tokens":
        growth = t.global_batch_tokens - t.ramp.start_tokens
        return [n * unit for n in range(1, 4097) if growth % (n * unit) == 0]
    if field == "data.seq_len":
        per_rank = t.global_batch_tokens // max(1, p.dp * t.micro_batch_sequences)
        return {max(1, m.max_seq_len), *(per_rank // n for n in range(1, 4097) if 0 < n <= per_rank and per_rank % n == 0)}
    if field in ("optim.warmup_steps", "optim.constant_steps"):
        rest = c.optim.warmup_steps + c.optim.constant_steps - value
        steps = t.steps if not t.tokens else sum(level.num_steps for level in levels(t)) if not any(_batch(c)) else rest
        return [max(0, steps - rest)]
    if field in _BELOW_ONE:
        return [0.0, 0.5, 0.9, 0.95, 0.999]
    limits = {
        "train.recompute": [[name for name in value if name in _RECOMPUTED]] if isinstance(value, (list, tuple)) else [],
        "model.yarn.factor": [1.0], "optim.final_lr": [0.0, c.optim.lr], "optim.lr": [1e-3],
        "parallel.comm_sms": [0, _NCCL_BLOCKS],
        "cluster.env": [{name: text for name, text in c.cluster.env.items() if not variables.wrong(name, text)}],
        "checkpoint.interval": [0], "checkpoint.interval_seconds": [0.0],
        "train.steps": [1, c.optim.warmup_steps + c.optim.constant_steps],
    }  # fmt: skip
    if field in limits:
        return limits[field]
    if field in _NOT_NEGATIVE:
        return [type(value)(0)]
    if isinstance(value, int):
        return {1, *range(max(1, value - 16), max(1, value) + 17)}
    return [1.0] if isinstance(value, float) else []


# ---------------------------------------------------------------- rules


def _broken(c: Config) -> Iterator[Broken]:
    """Every broken rule. Rules between fields are asked only of fields that are themselves in range."""
    ranges = list(_ranges(c))
    yield from ranges
    if not ranges:
        yield from _model(c)
        yield from _fp8(c)
        yield from _layout(c)
        yield from _batch(c)
        yield from _optim(c)
        yield from _checkpoint(c)


def _numbers(c: Config, section: str = "") -> Iterator[Broken]:
    """`section`: of fields that begin so."""
    for name in _POSITIVE:
        if name.startswith(section) and not 0 < _of(name)(c) < math.inf:
            yield name, "must be positive and finite"
    for name in _NOT_NEGATIVE:
        if name.startswith(section) and not 0 <= _of(name)(c) < math.inf:
            yield name, "must be finite and not negative"


def _ranges(c: Config) -> Iterator[Broken]:
    yield from _numbers(c)
    for name in _BELOW_ONE:
        if not 0 <= _of(name)(c) < 1:
            yield name, "must be at least 0 and below 1"
    for name, source in c.data.sources.items():
        if not 0 < source.weight < math.inf:
            yield f"data.sources.{name}.weight", "must be positive and finite"
    for table in ("cluster.peak_tflops", *_fields("cluster.rates", "products attention memory")):
        for name, value in _of(table)(c).items():
            if not 0 < value < math.inf:
                yield f"{table}.{name}", "must be positive and finite"
    if not 0 <= c.stack.hidden <= 1:
        yield "stack.hidden", "is a share: from 0 to 1"
    for name, term in c.stack.terms.items():
        if not 0 <= term.low <= term.likely <= term.high < math.inf:
            yield f"stack.terms.{name}.likely", f"must be from low = {term.low:g} to high = {term.high:g}, and none negative"
    for name, phase in c.stack.phases.items():
        if not (0 <= phase.host_us < math.inf and 0 < phase.times < math.inf):
            yield f"stack.phases.{name}.times", "must be positive and finite, and host_us not negative"
        if name not in _PHASES:
            yield f"stack.phases.{name}.times", f"is of no phase; there are {', '.join(_PHASES)}"
    for name, text in c.cluster.env.items():
        if rule := variables.wrong(name, text):
            yield "cluster.env", rule
    for name, allowed in _CHOICES.items():
        if _of(name)(c) not in allowed:
            yield name, f"must be one of {', '.join(allowed)}"
    alerts = c.launch.alerts
    if any(not 0 < share <= 1 for share in alerts.budget):
        yield "launch.alerts.budget", "must be shares above 0, 1 at most"
    if alerts.webhook and not re.fullmatch(r"env:[A-Za-z_]\w*", alerts.webhook):
        yield _WEBHOOK, "must be env:NAME of an environment variable that holds the address: an address itself is a secret"
    for name in c.train.recompute:
        if name not in _RECOMPUTED:
            yield "train.recompute", f"must be a list of {', '.join(_RECOMPUTED)}"
    for name in ("name", "run_dir"):
        if not _of(name)(c).strip():
            yield name, "must not be empty"
    if c.name.strip() and (rule := places.wrong(c.name, parts=True)):
        yield "name", rule
    if not c.run_dir.isprintable() or c.run_dir.startswith("-"):
        yield "run_dir", "must be one line of printable text that does not begin with -"
    if rule := places.wrong(c.model.name):
        yield "model.name", rule
    for name in c.data.sources:
        if rule := places.wrong(name):
            yield "data.sources", f"{name!r}: {rule}"
    for word in c.checkpoint.trust:
        if not re.fullmatch(r"[0-9a-f]{16,64}", word):
            yield "checkpoint.trust", "must be a list of words of 16 hexadecimal digits or more, as a refusal names them"


def _checkpoint(c: Config) -> Iterator[Broken]:
    for name in ("interval", "interval_seconds"):
        if c.checkpoint.optimal_interval and getattr(c.checkpoint, name):
            yield f"checkpoint.{name}", "must be 0 where checkpoint.optimal_interval=true chooses how often"


def _model(c: Config) -> Iterator[Broken]:
    m = c.model
    if not 1 <= m.yarn.factor < math.inf:
        yield "model.yarn.factor", "must be at least 1 (1 is plain RoPE)"
    if m.yarn.beta_fast <= m.yarn.beta_slow:
        yield "model.yarn.beta_fast", f"must exceed model.yarn.beta_slow = {m.yarn.beta_slow:g}"
    if m.qk_rope_head_dim % 2:
        yield "model.qk_rope_head_dim", "must be even: rotary embedding turns pairs"
    if m.num_dense_layers > m.num_layers:
        yield "model.num_dense_layers", f"must not exceed model.num_layers = {m.num_layers}"
    if m.num_experts % m.num_groups:
        yield "model.num_groups", f"must divide model.num_experts = {m.num_experts}"
    elif m.num_groups > 1 and m.num_experts // m.num_groups < 2:
        yield "model.num_groups", "a group is ranked by its two best experts, so it needs two"
    if m.score_func == "softmax" and m.num_limited_groups < m.num_groups:
        yield "model.score_func", "softmax scores (DeepSeek-V2) know no limit on groups as V3 has it: model.num_limited_groups < num_groups"
    if m.num_limited_groups > m.num_groups:
        yield "model.num_limited_groups", f"must not exceed model.num_groups = {m.num_groups}"
    elif m.num_experts % m.num_groups == 0 and m.top_k > (reachable := m.num_experts // m.num_groups * m.num_limited_groups):
        yield "model.top_k", f"must not exceed the {reachable} experts of {m.num_limited_groups} group(s)"
    # The grouped matrix product wants rows of whole 16-byte units; FP64 goes another way.
    unit = {"fp32": 4, "bf16": 8}.get(c.precision.compute, 1)
    for name in ("dim", "expert_hidden_dim") if m.num_moe_layers > 0 else ():
        if getattr(m, name) % unit:
            yield f"model.{name}", f"must be a multiple of {unit}: expert weights in {c.precision.compute} need rows of 16-byte units"


def _fp8(c: Config) -> Iterator[Broken]:
    """Both dims of every matrix, and the tokens of a micro-batch, are contiguous in some FP8 product: in rows of whole 16-byte units."""
    if c.precision.linear != "fp8":
        return
    if c.precision.compute != "bf16":
        yield "precision.compute", "must be bf16 where precision.linear=fp8: the recipe has BF16 between its products"
    m, queries = c.model, c.model.num_heads * c.model.qk_head_dim
    widths = {
        "dim": m.dim,
        "q_lora_rank": m.q_lora_rank,
        "kv_lora_rank": m.kv_lora_rank,
        "qk_rope_head_dim": (m.q_lora_rank or queries) + m.kv_lora_rank + m.qk_rope_head_dim,
        "qk_nope_head_dim": queries if m.q_lora_rank else 0,
        "v_head_dim": m.num_heads * m.v_head_dim,
        "num_heads": m.num_heads * (m.qk_nope_head_dim + m.v_head_dim),
        "dense_hidden_dim": m.dense_hidden_dim if m.num_dense_layers else 0,
        "expert_hidden_dim": m.expert_hidden_dim if m.num_moe_layers else 0,
    }
    for name, width in widths.items():
        if width % 16:
            yield f"model.{name}", f"makes a matrix {width} wide: FP8 wants multiples of 16 (precision=bf16 does not)"
    if (tokens := c.train.micro_batch_sequences * c.data.seq_len) % 16:
        yield "train.micro_batch_sequences", f"makes micro-batches of {tokens} tokens: FP8 wants multiples of 16 (precision=bf16 does not)"


def _layout(c: Config) -> Iterator[Broken]:
    m, p = c.model, c.parallel
    if m.num_moe_layers > 0 and m.num_experts % p.ep:
        yield "parallel.ep", f"must divide model.num_experts = {m.num_experts}"
    if p.num_stages > m.num_layers:
        chunks_to_blame = p.chunks > m.num_layers or (p.chunks > 1 and p.pp <= m.num_layers)
        name = "parallel.chunks" if chunks_to_blame else "parallel.pp"
        yield name, f"{p.pp} ranks x {p.chunks} chunk(s) are {p.num_stages} stages, too many for model.num_layers = {m.num_layers}"
    if p.comm_sms > _NCCL_BLOCKS:
        yield "parallel.comm_sms", f"must not exceed {_NCCL_BLOCKS}: NCCL has no more thread blocks for a communicator"
    if (products := c.precision.products) not in c.cluster.peak_tflops:
        yield "cluster.peak_tflops", (f"has no peak for precision {products}, so the share of it that is used cannot be told: "
                                      f"add cluster.peak_tflops.{products}=TFLOPS")  # fmt: skip


def _batch(c: Config) -> Iterator[Broken]:
    s, t, dp, ramp = c.data.seq_len, c.train, c.parallel.dp, c.train.ramp
    if s > c.model.max_seq_len:
        yield "data.seq_len", f"must not exceed model.max_seq_len = {c.model.max_seq_len}"
    if t.global_batch_tokens % (unit := s * dp * t.micro_batch_sequences):
        yield ("train.global_batch_tokens",
               f"must be a multiple of seq_len x dp x micro_batch_sequences = {s} x {dp} x {t.micro_batch_sequences} = {unit}")  # fmt: skip
    elif ramp.tokens:
        if not 0 < ramp.start_tokens < t.global_batch_tokens or ramp.start_tokens % unit:
            yield ("train.ramp.start_tokens",
                   f"must be a multiple of {unit} (seq_len x dp x micro_batch_sequences) below train.global_batch_tokens = "
                   f"{t.global_batch_tokens}")  # fmt: skip
        growth, by = t.global_batch_tokens - ramp.start_tokens, ramp.increment_tokens
        if by == 0 or by % unit or growth % by:
            yield "train.ramp.increment_tokens", f"must be a multiple of {unit} that divides the batch's growth of {growth}"


def _optim(c: Config) -> Iterator[Broken]:
    o, t = c.optim, c.train
    if any(_batch(c)):
        return
    steps = sum(level.num_steps for level in levels(t))
    length = f"train.steps = {steps}" if not t.tokens else f"the {steps} steps of train.tokens = {t.tokens}"
    if c.model.score_func == "softmax" and o.bias_update_speed:
        yield "optim.bias_update_speed", "softmax scores are DeepSeek-V2's, which has no selection bias: such a model could not be exported"
    if o.final_lr > o.lr:
        yield "optim.final_lr", f"must not exceed optim.lr = {o.lr:g}"
    if o.decay_steps == 0 and o.warmup_steps + o.constant_steps > steps:
        name = "warmup_steps" if o.warmup_steps > steps or not o.constant_steps else "constant_steps"
        yield f"optim.{name}", f"warm-up and constant steps must fit in {length}"
