"""PyTorch's batch norms, whose batch may be that of all ranks of a torch.distributed group.

(torch.nn.SyncBatchNorm is for GPUs alone.)
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastxm.ops import modulation


class BatchNorm(_BatchNorm):
    """What `BatchNorm1d` and `BatchNorm2d` share: in one process PyTorch's own, bit by bit."""

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group: "dist.ProcessGroup | None" = None  # of `synchronise`
    rows = 0  # of the batch of all ranks

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] or [B, C, H, W], to the same.

        Args:
            x: of a group, this rank's rows of a batch of `rows`; one is enough.
        """
        if self.group is None or not self.training:
            return super().forward(x)
        maps = x if x.ndim == 4 else x[:, :, None, None]
        scale, shift = (
            t[:, None, None].expand(x.shape[0], -1, 1, 1) for t in (self.weight - 1, self.bias)
        )
        mean, var = (torch.zeros_like(t) for t in (self.running_mean, self.running_var))
        out = modulation(
            maps,
            scale,
            shift,
            running_mean=mean,  # become the batch's
            running_var=var,
            momentum=1.0,
            eps=self.eps,
            activation="none",
            group=self.group,
        )
        self.track(mean, var, self.rows * (maps.shape[2] * maps.shape[3]))
        return out.reshape(x.shape)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, n: int) -> None:
        """Moves the running statistics as PyTorch does, which keeps the unbiased variance.

        Args:
            mean, var: [C], of a batch, the variance biased.
            n: values of a channel that they are of.
        """
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (n / (n - 1)), self.momentum)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` of [B, C]."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`."""
