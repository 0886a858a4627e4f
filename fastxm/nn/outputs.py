"""What leaves a network: numbers of at least float32, and pictures in [0, 1]."""

import torch
from torch import Tensor


def at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_picture(x: Tensor) -> Tensor:
    """Any numbers, [B, 3, H, W], to [0, 1], at least float32."""
    return (torch.tanh(at_least_float(x)) + 1) / 2
