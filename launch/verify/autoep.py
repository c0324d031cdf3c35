"""A training session of DeepSpeed's AutoEP on `transformers`' DeepSeek-V3, watched as closely as one of ours.

AutoEP replaces the mixture-of-experts blocks of a Hugging Face model by its own, which exchange tokens over ep ranks; DeepSpeed's
engine trains it with ZeRO-1 over edp x ep ranks, in FP32 (its masters and norms are FP32 whatever the weights are). All is read
through what DeepSpeed offers for it (`safe_get_full_grad` and its like), but for what it gives only within: the clip coefficient is
measured around `unscale_and_clip_grads`, and routing is seen, or decided, by hooks on AutoEP's router. It has no losses that balance
experts and does not move selection biases, so those fields of `config.optim` are not read. Written against DeepSpeed 0.19.8.

N samples of a step   S sequence length   T tokens of a micro-batch   E experts   K top-k
"""

import importlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...conf.schema import Config, ConfigError, OptimConfig
from ...parallel.optimizer import deepspeed_zero
from ...train.interop.hf_format import Piece, pieces, to_hf_config, weight_shapes
from ..local import fork_ranks
from .evidence import Choose, Evidence, Step

LOOP = {"use_grouped_mm": False}  # AutoEP's plain form: its grouped one has a SwiGLU in Triton, and wants it of a CPU too
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
ROUNDING = 1e-6  # of FP32 numbers that ought to be the same
SURELY = 1e3  # added to the score of an expert that is to be chosen; scores are below 1


@dataclass(kw_only=True)
class Part:
    """Elements of the tensor `name`, from `offset` on; of all these, this rank's ZeRO partition holds `owned`, (begin, end)."""

    name: str
    offset: int
    data: Tensor  # empty where another replica's serves
    owned: tuple[int, int] = (0, 0)


@dataclass(kw_only=True)
class Seen:
    """One step on one rank.

    clip_coefs  measured on each of this rank's flat gradients
    choices     (S, K) by layer and sample
    loads       (E,) by layer, of this rank's tokens
    """

    numbers: dict[str, float] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    clip_coefs: list[float] = field(default_factory=list)
    choices: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def train(
    config: Config, first: Mapping[str, Tensor], rows: Sequence[Tensor], choose: Choose | None = None, timeout_s: float = 300.0
) -> Evidence:
    """One step per item of `rows`, each (N, S + 1) int64 tokens, from `first`, as in `Evidence`.

    Data-parallel rank r of the edp x ep trains samples r N / dp and so on, `train.micro_batch_sequences` at a time; the learning rate is
    `optim.lr` throughout. `choose` decides the routing instead of AutoEP's router, within the groups that this allows.
    Raises ConfigError for what AutoEP cannot train and for packages that are missing, RankFailed where a rank raises, dies or hangs.
    """
    _check(config, rows)
    preload()
    seen = fork_ranks(config.parallel.world_size, _rank, config, dict(first), list(rows), choose, timeout_s=timeout_s)
    return _gather(config, first, rows, seen)


def preload() -> None:
    """The imports, once, in the parent of the ranks. ConfigError if a package is missing."""
    deepspeed_zero.preload()
    try:
        for name in (
            "deepspeed",
            "deepspeed.module_inject.auto_ep",
            "transformers",
            "transformers.models.deepseek_v3.modeling_deepseek_v3",
        ):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError("target", "deepspeed", f"{error}; AutoEP and transformers come with pip install 'shoestring[test]'") from error


def make_engine(
    config: Config, model: nn.Module, *, lr: float, num_micro_batches: int, experts: Mapping[str, Any] = LOOP, bf16: bool = False
):
    """DeepSpeed's engine with AutoEP over `model`, on the ranks of torch.distributed. `experts`: more of AutoEP's own settings."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split_experts

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed insists, and asks for nothing else that a launcher sets
    deepspeed_zero.prepare(torch.device("cpu"))
    o = config.optim
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": o.clip,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1 << 23, "allgather_bucket_size": 1 << 23},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1 << 30,
        "expert_parallel": {"enabled": True, "autoep_size": config.parallel.ep, "preset_model": "deepseek_v3", **experts},
    }

    def optimizer(_) -> torch.optim.Optimizer:  # made once AutoEP has replaced the experts
        groups = [group for group in split_experts(_weight_groups(model, o)) if group["params"]]
        return torch.optim.AdamW(groups, lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)

    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _weight_groups(model: nn.Module, o: OptimConfig) -> list[dict]:
    """Matrices decay, norms do not."""
    matrices, norms = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    return [
        {"name": "matrices", "params": matrices, "weight_decay": o.weight_decay},
        {"name": "norms", "params": norms, "weight_decay": 0.0},
    ]


def _check(config: Config, rows: Sequence[Tensor]) -> None:
    p, m = config.parallel, config.model
    for name, value, wanted in (
        ("parallel.pp", p.pp, 1), ("model.mtp_depth", m.mtp_depth, 0), ("model.score_func", m.score_func, "sigmoid"),
        ("optim.algorithm", config.optim.algorithm, "adamw"),
    ):  # fmt: skip
        if value != wanted:
            raise ConfigError(name, value, "DeepSpeed's AutoEP on transformers' DeepSeek-V3 does not have it", wanted)
    if not m.num_moe_layers:
        raise ConfigError(
            "model.num_dense_layers", m.num_dense_layers, f"of {m.num_layers} layers: AutoEP wants one with experts", m.num_layers - 1
        )
    if m.num_experts % p.ep:
        raise ConfigError("parallel.ep", p.ep, f"AutoEP wants a divisor of model.num_experts = {m.num_experts}")
    at_once = p.dp * config.train.micro_batch_sequences
    if not rows or any(r.shape != rows[0].shape or len(r) % at_once for r in rows):
        shapes = [tuple(r.shape) for r in rows]
        raise ConfigError("rows", shapes, f"want equal batches of a multiple of {at_once} sequences (ranks x sequences of a micro-batch)")


# ---------------------------------------------------------------- on a rank


def _rank(config: Config, first: dict[str, Tensor], rows: list[Tensor], choose: Choose | None) -> list[Seen]:
    rank, micro = dist.get_rank(), config.train.micro_batch_sequences
    share = len(rows[0]) // config.parallel.dp
    engine = make_engine(config, _model(config, first), lr=config.optim.lr, num_micro_batches=share // micro)
    places, clipping, router = _places(engine.module, config), _Clipping(engine.optimizer), _Routing(engine.module, choose)
    steps = []
    for step, rows_NS in enumerate(rows):
        losses, s = [], Seen()
        clipping.seen = s
        for at in range(rank * share, (rank + 1) * share, micro):
            router.begin(s, step, range(at, at + micro))
            tokens_BS = rows_NS[at : at + micro]
            logits_BSV = engine(input_ids=tokens_BS[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
            engine.backward(loss)  # divided by the number of micro-batches there
            if at + micro == (rank + 1) * share:
                _read(s, places, "grad")
            engine.step()  # does something on the last one
            losses.append(loss.detach().double())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        s.numbers = {"loss": mean.item() / config.parallel.dp, "grad_norm": float(engine.get_global_grad_norm()), "lr": engine.get_lr()[0]}
        # DeepSpeed does this within its first step, after one group's update: what it links of the other groups is nothing.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        for what in ("master", "exp_avg", "exp_avg_sq"):
            _read(s, places, what)
        s.parts += _biases(router.layers) if rank == 0 else []
        steps.append(s)
    return steps


@torch.no_grad()
def _model(config: Config, first: dict[str, Tensor]) -> nn.Module:
    """In FP32, training mode, with the weights `first`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    hf = DeepseekV3Config(**to_hf_config(config.model, "fp32"))
    model = DeepseekV3ForCausalLM._from_config(hf, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    for p in pieces(config.model, stacked=True):
        target = theirs[p.name] if p.index is None else theirs[p.name][p.index]
        source = first[p.weight if p.is_selection_bias else f"{p.weight}.master"]
        target.copy_(source[p.offset : p.offset + p.numel].view(p.shape))
    return model.train()


def _places(model: nn.Module, config: Config) -> dict[nn.Parameter, list[tuple[Piece, int]]]:
    """Which pieces of ours a parameter of this rank holds, and from which of its elements on."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    params, modules = dict(model.named_parameters()), dict(model.named_modules())
    places = defaultdict(list)
    for p in pieces(config.model):
        block, _, rest = p.name.partition(".mlp.")
        layer = modules.get(f"{block}.mlp")
        if not isinstance(layer, AutoEPMoELayer) or rest.startswith("shared_experts."):
            places[params[p.name]].append((p, 0))
        elif rest == "gate.weight":
            places[layer.router.gate.weight].append((p, 0))
        elif rest.startswith("experts."):
            _, expert, projection, _ = rest.split(".")
            slot = int(expert) - layer.ep_rank * layer.num_local_experts
            if 0 <= slot < layer.num_local_experts:
                places[getattr(layer.experts, PROJECTIONS[projection])].append((p, slot * p.numel))
    return places


def _read(s: Seen, places: dict[nn.Parameter, list[tuple[Piece, int]]], what: str) -> None:
    """Whole parameters from DeepSpeed, together with the other ranks; the first replica of each keeps them."""
    from deepspeed import utils

    for param, held in places.items():
        if what == "grad":
            whole = utils.safe_get_full_grad(param)
        elif what == "master":
            whole = utils.safe_get_full_fp32_param(param)
            if not torch.equal(whole, param.detach()):
                away = (whole - param.detach()).abs().max()
                s.faults.append(f"{held[0][0].name} on rank {dist.get_rank()} is up to {away:.1e} away from the masters of its replicas")
        else:
            whole = utils.safe_get_full_optimizer_state(param, what)
        if whole is None:
            continue
        fragment, first_replica = param._hp_mapping and param._hp_mapping.lp_fragment_address, dist.get_rank(param._dp_group) == 0
        begin, end = (fragment.start, fragment.start + fragment.numel) if fragment else (0, 0)
        for p, start in held:
            owned = (max(begin, start) - start, min(end, start + p.numel) - start)
            data = whole.flatten()[start : start + p.numel].clone() if first_replica else torch.empty(0)
            s.parts.append(Part(name=f"{p.weight}.{what}", offset=p.offset, data=data, owned=owned))


def _biases(layers: Mapping[int, nn.Module]) -> list[Part]:
    biases = {f"layers.{number}.router.bias": layer.router.e_score_correction_bias for number, layer in layers.items()}
    return [Part(name=name, offset=0, data=bias_E.detach().clone()) for name, bias_E in biases.items()]


class _Clipping:
    """Measures by how much the optimizer scales each of its flat gradients."""

    def __init__(self, zero):
        self.seen, self._scale = None, zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._measured

    def _measured(self, flats: list[Tensor], norm: Tensor) -> None:
        before = [flat.double().norm() for flat in flats]
        self._scale(flats, norm)
        self.seen.clip_coefs += [(flat.double().norm() / was).item() for flat, was in zip(flats, before) if was > 0]


class _Routing:
    """Looks on at AutoEP's routers, and tells them what to choose where somebody decides it."""

    def __init__(self, model: nn.Module, choose: Choose | None):
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        self.layers = {int(name.split(".")[2]): m for name, m in model.named_modules() if isinstance(m, AutoEPMoELayer)}
        for number, layer in self.layers.items():
            layer.router.register_forward_hook(partial(self._record, number))
            if choose:
                layer.router.register_forward_pre_hook(partial(self._decide, number, choose))

    def begin(self, seen: Seen, step: int, samples: range) -> None:
        """Before each micro-batch."""
        self.seen, self.step, self.samples = seen, step, samples

    def _record(self, layer: int, router: nn.Module, args, answer) -> None:
        _, expert_TK, load_E = answer
        loads = self.seen.loads
        loads[layer] = loads.get(layer, 0) + load_E.long()
        for sample, expert_SK in zip(self.samples, expert_TK.sort(1).values.chunk(len(self.samples))):
            self.seen.choices[layer, sample] = expert_SK.clone()

    @torch.no_grad()
    def _decide(self, layer: int, choose: Choose, router: nn.Module, args: tuple[Tensor, None]) -> tuple[Tensor, Tensor]:
        """The bias that AutoEP adds for the choice alone, here of each token."""
        x_TD, _ = args
        score_TE = router.gate(x_TD).sigmoid()
        expert_TK = choose(self.step, layer, list(self.samples), lambda wanted_TE: router.forward(x_TD, wanted_TE - score_TE)[1], score_TE)
        return x_TD, torch.zeros_like(score_TE).scatter_(1, expert_TK, SURELY)


# ---------------------------------------------------------------- from ranks to evidence


def _gather(config: Config, first: Mapping[str, Tensor], rows: Sequence[Tensor], seen: list[list[Seen]]) -> Evidence:
    shapes = weight_shapes(config.model)
    steps, faults, owners = [], [], defaultdict(list)
    for number, of_ranks in enumerate(zip(*seen), 1):
        when = f"in step {number}"
        faults += [f"{fault} {when}" for s in of_ranks for fault in s.faults]
        numbers = {name: _one([s.numbers[name] for s in of_ranks], f"{name} {when}", faults) for name in of_ranks[0].numbers}
        numbers["clip_coef"] = _one(
            [coef for s in of_ranks for coef in s.clip_coefs], f"clip coefficient of parameter groups {when}", faults
        )
        tensors: dict[str, Tensor] = {}
        for rank, s in enumerate(of_ranks):
            for part in s.parts:
                shape = shapes.get(part.name) or shapes[part.name.rpartition(".")[0]]
                whole = tensors.setdefault(part.name, torch.full(shape, torch.nan).flatten())
                whole[part.offset : part.offset + len(part.data)] = part.data
                begin, end = part.owned
                if begin < end and number == 1:
                    owners[part.name].append((part.offset + begin, part.offset + end, rank))
        faults += [f"{name} {when} is not a number, or not told by DeepSpeed, in places" for name, t in tensors.items() if t.isnan().any()]
        steps.append(Step(numbers=numbers, tensors=tensors, **_routing(len(rows[0]), of_ranks)))
    held = {name: sorted(parts) for name, parts in owners.items()}
    return Evidence(first={name: t.float() for name, t in first.items()}, steps=steps, owners=held, faults=faults, complete=False)


def _routing(num_samples: int, of_ranks: Sequence[Seen]) -> dict:
    choices = {}
    for s in of_ranks:
        for (layer, sample), expert_SK in s.choices.items():
            choices.setdefault(layer, torch.full((num_samples, *expert_SK.shape), -1))[sample] = expert_SK
    return {"loads_LE": torch.stack([sum(s.loads[layer] for s in of_ranks) for layer in sorted(choices)]), "choices": choices}


def _one(values: list[float], what: str, faults: list[str]) -> float:
    """What all should agree on."""
    low, high = min(values), max(values)
    if not high - low <= ROUNDING * abs(high):
        faults.append(f"{what} is {low:.8g} to {high:.8g}: ranks disagree")
    return values[0]
