"""MMD-GAN's objective on what a critic makes of two samples (C.-L. Li et al., NIPS 2017).

    L = sqrt(max(MMD^2(f(x), f(y)), 0) + eps) + w h
    h = -mean_k relu(mean_i f(y_i)_k - mean_i f(x_i)_k)

The critic f ascends L less its autoencoder's errors, the generator of y descends L. h <= 0 keeps
the features of real rows above those of generated ones ("one-sided", feasible set reduction).
"""

import torch.nn.functional as F
from torch import Tensor

from fastxm.losses.mmd import mmd_loss
from fastxm.ops.mmd import DEFAULT, Kernel


def one_sided(fx: Tensor, fy: Tensor) -> Tensor:
    """h, at most 0: how far the mean features of generated rows lie above those of real ones.

    Args:
        fx: [N, D], of real rows.
        fy: [M, D], of generated rows.
    """
    return -F.relu(fy.mean(0) - fx.mean(0)).mean()


def mmd_gan(
    fx: Tensor,
    fy: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    rank_weight: float = 16.0,
    eps: float = 1e-8,
) -> Tensor:
    """What MMD-GAN's critic ascends and its generator descends.

    Args:
        fx: [N, D], the critic's features of real rows.
        fy: [M, D], of generated rows.
        kernel: as mmd2 takes it.
        rank_weight: w, of the one-sided term.
        eps: keeps the root's gradient finite at 0, in units of MMD^2.

    Returns:
        scalar, float32 (float64 for float64 inputs).
    """
    return mmd_loss(fx, fy, kernel, root=True, eps=eps) + rank_weight * one_sided(fx, fy)
