"""The contestants of `step_vs_peers.py` on two ranks: Shoestring at ep 2, and DeepSpeed AutoEP on the model of `transformers`.

AutoEP replaces the mixture-of-experts blocks of a Hugging Face model by its own, which exchange tokens; DeepSpeed's engine trains it
with ZeRO-1. Its fused SwiGLU is a GPU kernel that it tries on CPU tensors too, so its grouped product runs here with the plain form,
registered by DeepSpeed's own function for that.
"""

import importlib
import logging

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import LR, Variant, summed_loss, transformers_model
from shoestring.conf.schema import Config
from shoestring.launch.verify.autoep import LOOP, make_engine
from shoestring.launch.verify.autoep import preload as preload_autoep
from torch import Tensor

RANKS = 2


def preload() -> None:
    """DeepSpeed's imports, once, in the parent of the ranks."""
    preload_autoep()
    experts = importlib.import_module("deepspeed.moe.ep_experts")
    experts.register_expert_activation("plain_swiglu", lambda gate, up, alpha, limit: F.silu(gate) * up)


class AutoEP:
    """DeepSpeed's engine over `transformers` with AutoEP."""

    def __init__(self, config: Config, variant: Variant):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.config = config
        self.engine = make_engine(
            config,
            transformers_model(config, "eager"),
            lr=LR,
            num_micro_batches=config.num_micro_batches,
            experts=LOOP if variant.experts == "loop" else {"expert_activation": "plain_swiglu"},
            bf16=variant.precision == "bf16",
        )

    def step(self, rows_BS: Tensor) -> float:
        config, losses = self.config, []
        mine = rows_BS.chunk(RANKS)[dist.get_rank()].split(config.train.micro_batch_sequences)
        for rows in mine:
            loss = summed_loss(self.engine, rows) / rows[:, 1:].numel()
            self.engine.backward(loss)  # divided by the number of micro-batches there
            self.engine.step()  # does something on the last one
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return mean.item() / RANKS
