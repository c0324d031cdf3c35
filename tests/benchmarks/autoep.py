"""The contestants of `step_vs_peers.py` on two ranks: Shoestring at ep 2, and DeepSpeed AutoEP on the model of `transformers`.

AutoEP replaces the mixture-of-experts blocks of a Hugging Face model by its own, which exchange tokens; DeepSpeed's engine trains it
with ZeRO-1. Its fused SwiGLU is a GPU kernel that it tries on CPU tensors too, so its grouped product runs here with the plain form,
registered by DeepSpeed's own function for that.
"""

import importlib
import logging
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import LR, Variant, betas, summed_loss, transformers_model, weight_groups
from shoestring.conf.schema import Config
from shoestring.parallel.optimizer import deepspeed_zero
from torch import Tensor

RANKS = 2


def preload() -> None:
    """DeepSpeed's imports, once, in the parent of the ranks."""
    deepspeed_zero.preload()
    importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.module_inject.auto_ep")
    experts = importlib.import_module("deepspeed.moe.ep_experts")
    experts.register_expert_activation("plain_swiglu", lambda gate, up, alpha, limit: F.silu(gate) * up)


class AutoEP:
    """DeepSpeed's engine over `transformers` with AutoEP."""

    def __init__(self, config: Config, variant: Variant):
        import deepspeed

        os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed insists, and asks for nothing else that a launcher sets
        deepspeed_zero.prepare(torch.device("cpu"))
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.config = config
        model = transformers_model(config, "eager")
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=lambda _: torch.optim.AdamW(self._groups(model), lr=LR, betas=betas(config), eps=config.optim.eps, fused=True),
            config=self._settings(variant),
            dist_init_required=False,
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

    def _groups(self, model) -> list[dict]:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        return [g for g in split_params_into_different_moe_groups_for_optimizer(weight_groups(model, self.config)) if g["params"]]

    def _settings(self, variant: Variant) -> dict:
        c = self.config
        experts = {"use_grouped_mm": False} if variant.experts == "loop" else {"expert_activation": "plain_swiglu"}
        return {
            "train_micro_batch_size_per_gpu": c.train.micro_batch_sequences,
            "gradient_accumulation_steps": c.num_micro_batches,
            "gradient_clipping": c.optim.clip,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1 << 23, "allgather_bucket_size": 1 << 23},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": variant.precision == "bf16"},
            "expert_parallel": {"enabled": True, "autoep_size": RANKS, "preset_model": "deepseek_v3", **experts},
            "steps_per_print": 1 << 30,
        }
