"""Engine `deepspeed`: DeepSpeed's ZeRO-1 optimizer, stood up by hand. No other file that trains touches DeepSpeed.

DeepSpeed reduces, steps and gathers; scale, norm and clip stay ours (`ShardedOptimizer`). Written against DeepSpeed 0.19.8, of which
it uses these undocumented names: `DeepSpeedZeroOptimizer` built without an engine; `param.grad_accum`, `.allreduce`, `.group_name`,
`._hp_mapping`; the optimizer's `averaged_gradients`, `bit16_groups`, `single_partition_of_fp32_groups`, `use_grad_accum_attribute`,
`_grad_acc_hooks`, `_lazy_init_hp_params_optimizer_state`, `update_lp_params`, `compute_grad_norm`, `_wait_for_offload_copies`;
`deepspeed.ops.__compatible_ops__`.
"""

import importlib
import logging
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...conf.schema import OptimConfig
from .zero import Chunk, ShardedOptimizer, Spec, in_collective_order

# It allocates a bucket of this many FP32 elements in each reduction (its default, 5e8, would be 2 GB).
BUCKET = 1 << 23


class DeepSpeedOptimizer(ShardedOptimizer):
    """AdamW with FP32 masters and moments, for FP32 and BF16 weights that may be cut anywhere; ValueError for others.

    With `optim.offload` masters, moments and this rank's share of the reduced gradients are on the host, and the norm is taken there.
    Reduces all stages at once, when the last one is announced. Each replica group is one of DeepSpeed's "MoE" groups, which are just
    named groups: so experts, dense and tied parameters are treated alike, and alike on every rank.
    """

    def __init__(self, specs: Sequence[Spec], optim: OptimConfig):
        for s in specs:
            if s.param.dtype == torch.float64 or s.unit != 1:
                raise ValueError(f"engine 'deepspeed' cannot hold {s.name} ({s.param.dtype}, unit {s.unit}): use optim.engine=whole")
        super().__init__(specs, optim)

    def _allocate(self, specs):
        prepare(self._device())
        for s in specs:
            self.main_grad[s.name] = s.param.main_grad = torch.zeros_like(s.param, dtype=torch.float32, requires_grad=False)
        self._zero = self._build(specs)
        self._zero.use_grad_accum_attribute = True  # FP32 weights too: hand gradients over as `grad_accum`, never as `grad`
        for hook in self._zero._grad_acc_hooks:  # they would take what autograd leaves in `param.grad`
            hook.remove()
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        self._zero._lazy_init_hp_params_optimizer_state()

    def _build(self, specs):
        from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        keyed: dict[tuple, list[Spec]] = {}
        for s in specs:
            keyed.setdefault((s.group, s.param.dtype, s.decay), []).append(s)
        groups, param_groups = {}, []
        for key in in_collective_order(keyed):
            group, _, decay = key
            name = next((n for n, g in groups.items() if g is group), f"replicas{len(groups)}")
            groups[name] = group
            for s in keyed[key]:
                s.param.allreduce, s.param.group_name = False, name
            params = [s.param for s in keyed[key]]
            param_groups.append({"params": params, "name": name, "moe": True, "weight_decay": self.optim.weight_decay if decay else 0.0})
        o, on_gpu = self.optim, self._device().type != "cpu"
        offload = DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=on_gpu) if o.offload else None
        zero = DeepSpeedZeroOptimizer(
            torch.optim.AdamW(param_groups, lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps, fused=True),
            {s.param: s.name for s in specs},
            NoopTimer(),
            optimizer_params={},
            dp_process_group=specs[0].group,  # of parameters that are not "MoE": there are none
            expert_parallel_group=groups,
            expert_data_parallel_group=groups,
            has_moe_layers=True,
            partition_grads=False,
            overlap_comm=False,
            communication_data_type=torch.float32,
            gradient_average=False,
            clip_grad=0.0,
            compute_grad_norm=o.offload,
            check_grad_overflow=False,
            reduce_bucket_size=max(BUCKET, *(s.param.numel() for s in specs)),
            offload_optimizer_config=offload,
        )
        zero.compute_grad_norm = False  # with offload it refuses to be built so, yet steps so: its own norm would want an `mpu`
        return zero

    def _start(self, stages):
        if self._unreduced:
            return
        for s in self.specs.values():  # fresh aliases: DeepSpeed re-points the tensor it is handed to its own bucket
            s.param.grad_accum = self.main_grad[s.name].detach()
        self._zero.reduce_gradients(pipeline_parallel=True)

    def _owned_grads(self):
        if self.optim.offload:
            self._zero._wait_for_offload_copies()
            return [flat.grad.view(-1) for flat in self._zero.single_partition_of_fp32_groups]
        return [g.view(-1) for i in range(len(self._zero.bit16_groups)) for g in self._zero.averaged_gradients[i] if g.numel()]

    def _update(self, lr):
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._zero.step()
        self._clear()

    def _clear(self):
        zero = self._zero
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):  # as its own step leaves them
            kept.update(dict.fromkeys(kept))
        if self.optim.offload:
            zero.reset_cpu_buffers()
        zero.micro_step_id = -1
        zero.zero_grad()
        for grad in self.main_grad.values():
            grad.zero_()

    def _gradients(self):
        chunks = {}
        for i, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            grads = flat.grad.view(-1) if self.optim.offload else torch.cat([g.view(-1) for g in self._zero.averaged_gradients[i]])
            first = flat.data_ptr()
            for s in self.specs.values():
                owned = s.param._hp_mapping
                if owned is not None and first <= owned.hp_fragment.data_ptr() < first + flat.numel() * flat.element_size():
                    at = (owned.hp_fragment.data_ptr() - first) // flat.element_size()
                    piece = grads[at : at + owned.hp_fragment.numel()]
                    chunks[s.name] = Chunk(s.numel, s.offset + owned.lp_fragment_address.start, piece)
        return chunks

    def _state(self):
        chunks = {}
        for s in self.specs.values():
            owned = s.param._hp_mapping
            if owned is not None:
                pieces = {"master": owned.hp_fragment.detach(), **{k: owned.optim_fragment[k] for k in ("exp_avg", "exp_avg_sq")}}
                at = s.offset + owned.lp_fragment_address.start
                chunks |= {f"{s.name}.{key}": Chunk(s.numel, at, piece) for key, piece in pieces.items()}
        return chunks

    @torch.no_grad()
    def _load(self):
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat]["step"].fill_(self.steps)
        self._zero.update_lp_params()


def prepare(device: torch.device) -> None:
    """Import DeepSpeed (seconds) and start its communication layer over the process groups that exist. Idempotent."""
    preload()
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device.type == "cpu" and get_accelerator().device_name() != "cpu":  # it took the GPU that this run does not use
        set_accelerator(importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator())
    # An empty table of compilable operators: none is used, probing starts compilers, and a shared-memory one takes 45 s to build.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def preload() -> None:
    """The imports alone: a parent that forks ranks does them once."""
    try:
        importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # imported by its first reduction otherwise
    except ImportError as error:
        raise ImportError(f"optim.engine=deepspeed wants the package deepspeed: {error}; or use optim.engine=whole") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)  # its calls, not ours
