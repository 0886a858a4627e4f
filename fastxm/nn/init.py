"""Glorot initialisation by a truncated normal, as JAX's and TensorFlow's `glorot_normal`."""

import math

from torch import Tensor, nn

# standard deviation of a unit normal cut at two of its own
TRUNCATED = 0.87962566103423978


def glorot_normal_(weight: Tensor, bias: Tensor | None = None) -> None:
    """Fills a kernel with variance 2 / (fan in + fan out), and its bias with zeros.

    Args:
        weight: [C_out, C_in, *kernel]; both fans count the kernel's area.
        bias: [C_out].
    """
    area = math.prod(weight.shape[2:])
    std = math.sqrt(2 / (area * (weight.shape[0] + weight.shape[1]))) / TRUNCATED
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if bias is not None:
        nn.init.zeros_(bias)
