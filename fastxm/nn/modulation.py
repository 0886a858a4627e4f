"""Normalisation whose scale and shift depend on the text: where gamma and beta come from.

`ModulatedNorm` normalises and applies them. `ConditionalModulation` makes them from a vector, one
pair for the whole picture; `AttentionalModulation` makes them from the words that each location
attends to. Both serve several layers at once, in one matrix product.
(Zhang et al., XMC-GAN, CVPR 2021, section 4.1.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.nn.batch_norm import BatchNorm
from fastxm.nn.init import glorot_normal_
from fastxm.ops import modulation, word_modulation
from fastxm.ops.dispatch import unit_rows

Pair = tuple[Tensor, Tensor]  # gamma, beta


class ModulatedNorm(nn.Module):
    """Batch norm (1 + gamma) + beta, then ReLU; running statistics as in training frameworks.

    Args:
        channels: C.
        momentum: weight of the newest batch in the running statistics.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    group: "dist.ProcessGroup | None" = None  # of `synchronise`

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor, update_stats: bool = True) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W].

        Args:
            x: [B, C, H, W].
            gamma, beta: [B, C, h, w] with H = k h and W = k w.
            update_stats: whether training moves the running statistics.
        """
        tracked = update_stats or not self.training
        return modulation(
            x,
            gamma,
            beta,
            running_mean=self.running_mean if tracked else None,
            running_var=self.running_var if tracked else None,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            group=self.group,
        )


def synchronise(network: nn.Module, group: "dist.ProcessGroup | None", rows: int) -> None:
    """Lets every `ModulatedNorm` and batch norm of ours take the batch of all ranks of a group.

    A network that has a group cannot be copied: copies are made before.

    Args:
        network: its norms are told.
        group: the ranks; None, of one process.
        rows: of all of them together, in every batch of a training.
    """
    for module in network.modules():
        if isinstance(module, (ModulatedNorm, BatchNorm)):
            module.group = group
        if isinstance(module, BatchNorm):
            module.rows = rows


@torch.no_grad()
def take_statistics(network: nn.Module, batches: Iterable[Sequence[Any]]) -> None:
    """Makes the running statistics those of the network as it is: their mean over some batches.

    Statistics that came with other weights, as those beside a moving average of weights, do not
    quite fit, the less so the smaller the batches of the training were.

    Args:
        network: called with each of the batches; in eval mode afterwards.
        batches: at least one.
    """
    kinds = (ModulatedNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    norms = [module for module in network.modules() if isinstance(module, kinds)]
    usual = [norm.momentum for norm in norms]
    network.train()
    try:
        for k, batch in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (k + 1)
            network(*batch)
    finally:
        for norm, momentum in zip(norms, usual):
            norm.momentum = momentum
        network.eval()


class Tables(nn.Linear):
    """One linear layer for the gammas of all layers, then their betas.

    Args:
        features: width of the condition.
        channels: C of each layer that is served.
    """

    def __init__(self, features: int, channels: Sequence[int]) -> None:
        self.channels = list(channels)
        super().__init__(features, 2 * sum(channels))

    def reset_parameters(self) -> None:
        # each layer's gamma and beta are projections of their own, with fans of their own
        for part in self.weight.split(2 * self.channels):
            glorot_normal_(part)
        nn.init.zeros_(self.bias)


class ConditionalModulation(nn.Module):
    """Gamma and beta of several layers from one vector.

    Args:
        features: width of the vector.
        channels: C of each layer.
    """

    def __init__(self, features: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.tables = Tables(features, channels)

    def forward(self, condition: Tensor) -> list[Pair]:
        """[B, features] -> for each layer gamma [B, C, 1, 1] and beta [B, C, 1, 1]."""
        parts = self.tables(condition)[:, :, None, None].split(2 * self.tables.channels, dim=1)
        n = len(self.tables.channels)
        return list(zip(parts[:n], parts[n:]))


class AttentionalModulation(nn.Module):
    """Gamma and beta of several layers from the words that each location attends to.

    A location's condition is [attended words; condition]; gamma and beta are linear in it. So the
    projection is applied to the words and not to the attended map, which is never formed.

    Args:
        channels_in: C of the map that attends.
        text_width: E of the words.
        features: width of the condition that all locations share.
        channels: C of each layer that is served.
        sharpness: factor of the cosine in the attention.
    """

    def __init__(
        self,
        channels_in: int,
        text_width: int,
        features: int,
        channels: Sequence[int],
        *,
        sharpness: float = 15.0,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.query = nn.Conv2d(channels_in, text_width, 1)
        glorot_normal_(self.query.weight, self.query.bias)
        self.tables = Tables(text_width + features, channels)

    def forward(self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor) -> list[Pair]:
        """For each layer gamma [B, C, h, w] and beta [B, C, h, w].

        Args:
            x: [B, channels_in, h, w].
            words: [B, T, E], of any length.
            lengths: [B], words beyond are not attended to.
            condition: [B, features].
        """
        of_words, of_condition = self.tables.weight.split([words.shape[-1], condition.shape[-1]], 1)
        gamma, beta = word_modulation(
            self.query(x),
            words,
            lengths,
            F.linear(unit_rows(words).to(words.dtype), of_words),
            F.linear(condition, of_condition, self.tables.bias),
            sharpness=self.sharpness,
        )
        channels = self.tables.channels
        return list(zip(gamma.split(channels, dim=1), beta.split(channels, dim=1)))
