"""Plain networks of linear layers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """Features [B, D] less their mean, over their spread; as they are until `fit`."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        """Takes mean and spread of features [N, D]."""
        self.mean.copy_(features.mean(0))
        # a channel that never fires in training would make any spark a blaze
        self.std.copy_(features.std(0, correction=0).clamp(min=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Unstandardise(Standardise):
    """Standard features [B, D] times a spread, and a mean: what `Standardise` takes away."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def mlp(
    widths: Sequence[int], *, slope: float = 0.2, linear: type[nn.Linear] = nn.Linear
) -> nn.Sequential:
    """Linear layers [B, widths[0]] -> [B, widths[-1]], leaky ReLUs of this slope between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [linear(a, b), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])
