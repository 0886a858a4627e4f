"""How far two samples are apart."""

import torch.nn.functional as F
from torch import Tensor

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
) -> Tensor:
    """How far two samples are apart: MMD^2, or the root that GMMN and MMD-GAN take of it.

    Args:
        x: [N, D].
        y: [M, D].
        kernel, estimator: as mmd2 takes them.
        root: sqrt(max(MMD^2, 0) + eps), whose gradient stays finite at 0.
        eps: in units of MMD^2.

    Returns:
        scalar, float32 (float64 for float64 inputs).
    """
    loss = mmd2(x, y, kernel, estimator=estimator)
    return (F.relu(loss) + eps).sqrt() if root else loss
