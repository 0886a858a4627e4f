"""How far two samples are apart, as losses: MMD, and what the players of MMD-GAN minimise."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.ops import mmd2
from fastxm.ops.mmd import DEFAULT, Kernel


def mmd_loss(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    estimator: str = "biased",
    root: bool = False,
    eps: float = 1e-8,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """How far two samples are apart: MMD^2, or the root that GMMN and MMD-GAN take of it.

    Args:
        x: [N, D].
        y: [M, D].
        kernel, estimator, group: as mmd2 takes them.
        root: sqrt(max(MMD^2, 0) + eps), whose gradient stays finite at 0.
        eps: in units of MMD^2.

    Returns:
        scalar, float32 (float64 for float64 inputs).
    """
    loss = mmd2(x, y, kernel, estimator=estimator, group=group)
    return (F.relu(loss) + eps).sqrt() if root else loss


class MMDLoss(nn.Module):
    """`mmd_loss` as a module; arguments are its own."""

    def __init__(
        self,
        kernel: Kernel = DEFAULT,
        *,
        estimator: str = "biased",
        root: bool = False,
        eps: float = 1e-8,
        group: "dist.ProcessGroup | None" = None,
    ):
        super().__init__()
        self.kernel, self.estimator, self.group = kernel, estimator, group
        self.root, self.eps = root, eps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mmd_loss(x, y, self.kernel, estimator=self.estimator, root=self.root, eps=self.eps,
                        group=self.group)  # fmt: skip


def mmd_gan_g(
    real: Tensor,
    fake: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    rank_weight: float = 16.0,
    eps: float = 1e-8,
) -> Tensor:
    """What the generator of MMD-GAN minimises: the root of MMD^2, and a one-sided term.

    sqrt(max(MMD^2, 0) + eps) - rank_weight mean_k max(mean fake[:, k] - mean real[:, k], 0)

    Args:
        real: [N, K], the critic's codes of data.
        fake: [M, K], of the generator's output.
        kernel: as mmd2 takes it; the estimator is the biased one.
        rank_weight: of the one-sided term, which is never above 0.
        eps: in units of MMD^2.

    Returns:
        scalar.

    Source: Li et al. 2017 (NeurIPS), MMD GAN; as in Das and Saha 2021.
    """
    distance = mmd_loss(real, fake, kernel, root=True, eps=eps)
    one_sided = -F.relu(fake.to(distance).mean(0) - real.to(distance).mean(0)).mean()
    return distance + rank_weight * one_sided


def mmd_gan_d(
    real: Tensor,
    fake: Tensor,
    pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    kernel: Kernel = DEFAULT,
    *,
    rank_weight: float = 16.0,
    reconstruction_weight: float = 8.0,
    eps: float = 1e-8,
) -> Tensor:
    """What the critic of MMD-GAN, an autoencoder, minimises: -mmd_gan_g, and what it loses.

    Args:
        real, fake, kernel, rank_weight, eps: as of mmd_gan_g.
        pairs: of the data and of the generator's output: what the critic decoded, and the input.
        reconstruction_weight: of the mean squared errors of both.

    Returns:
        scalar.
    """
    lost = torch.stack([F.mse_loss(decoded, given) for decoded, given in pairs]).sum()
    objective = mmd_gan_g(real, fake, kernel, rank_weight=rank_weight, eps=eps)
    return reconstruction_weight * lost - objective
