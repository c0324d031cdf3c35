"""The private names of torch that this folder uses, in one place."""

import torch

cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention

__all__ = ["cudnn_attention"]
