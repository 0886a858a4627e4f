"""Plain networks of linear layers."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], *, slope: float = 0.2) -> nn.Sequential:
    """Linear layers [B, widths[0]] -> [B, widths[-1]], leaky ReLUs of this slope between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])
