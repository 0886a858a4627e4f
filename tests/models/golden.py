"""The patterns that fill inputs and weights of the golden values: the same on any framework."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastxm.models.xmcgan import XMCGAN


def waves(shape: Sequence[int], a: float, c: float) -> Tensor:
    """sin(a i + c) over the row-major index i."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(a * i + c).astype(np.float32).reshape(shape))


def hashes(shape: Sequence[int]) -> Tensor:
    """Whole-number hash of the row-major index, in [-1, 1)."""
    i = np.arange(math.prod(shape), dtype=np.int64)
    h = 2 * (((7919 * i + 104729 * i * i) % 100003) / 100003 - 0.5)
    return torch.from_numpy(h.astype(np.float32).reshape(shape))


def kernel(weight: Tensor) -> Tensor:
    """A golden kernel for [C_out, C_in, *k]: hashes in the order k, k, C_in, C_out."""
    order = [*weight.shape[2:], weight.shape[1], weight.shape[0]]
    values = hashes(order) * math.sqrt(3 / math.prod(order[:-1]))
    return values.permute(-1, -2, *range(len(order) - 2))


@torch.no_grad()
def fill(model: XMCGAN) -> XMCGAN:
    """Golden weights: one kernel a layer; tables are one kernel for each gamma and each beta."""
    for name, tensor in model.state_dict().items():
        if name.endswith("tables.weight"):
            channels = model.get_submodule(name.removesuffix(".weight")).channels
            for part in tensor.split(2 * channels):
                part.copy_(kernel(part))
        elif name.endswith("tables.bias"):
            channels = model.get_submodule(name.removesuffix(".bias")).channels
            for part in tensor.split(2 * channels):
                part.copy_(0.1 * hashes(part.shape))
        elif name.endswith("weight"):
            tensor.copy_(kernel(tensor))
        elif name.endswith("bias"):
            tensor.copy_(0.1 * hashes(tensor.shape))
        elif name.endswith(".u"):
            tensor.copy_(hashes(tensor.shape))
    return model
