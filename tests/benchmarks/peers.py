"""The contestants of `step_vs_peers.py` in one process: Shoestring's engine and `transformers`' DeepSeek-V3, from equal weights.

A contestant's `step` is one whole optimizer step on the rows it is given: every micro-batch forward and backward, the global norm,
clipping at 1, AdamW. What differs, in favour of `transformers`: in bf16 its weights and both moments are bf16 (`shoestring` keeps FP32
masters, moments and gradient sums); it has no balance losses and no update of the routers' biases.

B sequences   S length
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from shoestring.conf.compose import load
from shoestring.conf.schema import Config, ModelConfig
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine
from shoestring.train.interop.hf_format import pieces, to_hf_config
from shoestring.train.model.decoder import CausalLM, materialise
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

LR = 1e-3
SEQ_LEN, SEQUENCES = 256, 16  # of a global batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# 6.1 M parameters. Every mechanism of DeepSeek-V3's blocks: q and kv latents, shared and routed experts, groups, sigmoid scores.
# All sizes are given, so that measurements of different months compare.
MODEL = [
    "model.name=bench", "model.num_layers=5", "model.dim=192", "model.vocab_size=4096", "model.max_seq_len=512", "model.num_heads=4",
    "model.q_lora_rank=96", "model.kv_lora_rank=64", "model.qk_nope_head_dim=32", "model.qk_rope_head_dim=16", "model.v_head_dim=32",
    "model.num_dense_layers=1", "model.dense_hidden_dim=512", "model.num_experts=16", "model.num_shared_experts=1", "model.top_k=4",
    "model.expert_hidden_dim=96", "model.num_groups=4", "model.num_limited_groups=2", "model.route_scale=2.5", "model.init_std=0.02",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train the model. `words`: more configuration for Shoestring, as on its command line."""

    library: str  # shoestring | transformers
    precision: str  # fp32 | bf16
    experts: str = ""  # transformers: eager | grouped_mm
    compiled: bool = False
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        more = (word for word in self.words if not (self.compiled and word == "launch.compile=true"))
        shown = [self.library, self.precision, self.experts, *more, "compiled" if self.compiled else ""]
        return " ".join(word for word in shown if word)


class Contestant(Protocol):
    def step(self, rows_BS: Tensor) -> float:
        """One optimizer step on tokens (B, S + 1), int64. Returns the mean loss over tokens, before the update."""
        ...


def configure(words: list[str], *, precision: str, micro: int, ranks: int = 1) -> Config:
    """Of Shoestring, for `micro` sequences in a micro-batch; the model's fields are those that every contestant gets."""
    batch = [f"data.seq_len={SEQ_LEN}", f"train.global_batch_tokens={SEQUENCES * SEQ_LEN}", f"train.micro_batch_sequences={micro}"]
    return load(["data=synthetic", *MODEL, f"precision={precision}", f"parallel.ep={ranks}", *batch, *words])


def make(variant: Variant, *, micro: int, words: list[str]) -> Contestant:
    """torch.distributed must be initialised."""
    if variant.library == "shoestring":
        return Shoestring(configure([*words, *variant.words], precision=variant.precision, micro=micro))
    return Transformers(configure(words, precision="fp32", micro=micro), variant)


class Shoestring:
    """Our engine. Of the global batch, this rank trains its own share."""

    def __init__(self, config: Config):
        self.config, self.engine = config, Engine(config)

    def step(self, rows_BS: Tensor) -> float:
        parallel = self.config.parallel
        mine = rows_BS.chunk(parallel.dp)[self.engine.mesh.dp_rank].split(self.config.train.micro_batch_sequences)
        return self.engine.train_step([MicroBatch(tokens_BS=r[:, :-1], targets_BN=r[:, 1:]) for r in mine], LR).loss


class Transformers:
    """The model of `transformers` with torch's fused AdamW."""

    def __init__(self, config: Config, variant: Variant):
        self.micro = config.train.micro_batch_sequences
        self.model = transformers_model(config, variant.experts).to(DTYPES[variant.precision])
        self.optimizer = torch.optim.AdamW(weight_groups(self.model, config), lr=LR, betas=betas(config), eps=config.optim.eps, fused=True)
        self.clip = config.optim.clip
        self.loss = torch.compile(self._loss) if variant.compiled else self._loss

    def step(self, rows_BS: Tensor) -> float:
        losses = []
        for rows in rows_BS.split(self.micro):
            loss = self.loss(rows) / rows_BS[:, 1:].numel()
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(losses).item()

    def _loss(self, rows_BS: Tensor) -> Tensor:
        return summed_loss(self.model, rows_BS)


def summed_loss(model: nn.Module, rows_BS: Tensor) -> Tensor:
    """Over the tokens, in FP32; the loss belongs to what is compiled."""
    logits_BSV = model(input_ids=rows_BS[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), rows_BS[:, 1:].flatten(), reduction="sum")


def betas(config: Config) -> tuple[float, float]:
    return config.optim.beta1, config.optim.beta2


def weight_groups(model: nn.Module, config: Config) -> list[dict]:
    """Matrices decay, norms do not; each group has a name, which DeepSpeed wants."""
    decay, keep = [], []
    for param in model.parameters():
        (decay if param.dim() > 1 else keep).append(param)
    named = {"matrices": (decay, config.optim.weight_decay), "norms": (keep, 0.0)}
    return [{"params": params, "weight_decay": rate, "name": name} for name, (params, rate) in named.items()]


def transformers_model(config: Config, experts: str) -> DeepseekV3ForCausalLM:
    """In FP32, training mode, with the weights that Shoestring begins with."""
    hf = DeepseekV3Config(**to_hf_config(config.model, "fp32"))
    model = DeepseekV3ForCausalLM._from_config(hf, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32)
    return copy_weights(first_weights(config), config.model, model).train()


def first_weights(config: Config) -> dict[str, Tensor]:
    """By our global names, made as every run makes them."""
    with torch.device("meta"):
        model = CausalLM(config.model)
    materialise(model.stage, seed=config.train.seed)
    return dict(model.stage.named_parameters()) | dict(model.stage.named_buffers())


@torch.no_grad()
def copy_weights(ours: dict[str, Tensor], m: ModelConfig, model: nn.Module) -> nn.Module:
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    left = {name for name in theirs if "rotary" not in name}
    for piece in pieces(m, stacked=True):
        flat, target = ours[piece.weight].reshape(-1)[piece.offset : piece.offset + piece.numel], theirs[piece.name]
        (target if piece.index is None else target[piece.index]).copy_(flat.view(piece.shape))
        left.discard(piece.name)
    assert not left, f"weights of transformers that have no counterpart: {left}"
    return model
