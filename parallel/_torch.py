"""The private and version-dependent names of torch that this folder uses, in one place.

torch 2.11 knows `reduce_scatter_tensor` and `all_gather_into_tensor` only; 2.13 deprecates them for the `*_single` names.
"""

import torch
import torch.distributed as dist
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.optim.adamw import adamw

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm

__all__ = ["adamw", "all_gather", "foreach_mul_", "foreach_norm", "get_schedule_ops", "reduce_scatter"]
