"""The sigmoid loss of all pairs of two sets of rows, by blocks of rows. Formula: siglip.py."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm.ops.dispatch import wide

BLOCK = 16 << 20  # bytes of a block of logits


def pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, paired: bool, gradients: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum over all pairs of rows x [N, D] and y [M, D], and its gradients to the four, or none.

    paired: whether the rows are each other's partners; else all pairs are negatives.
    """
    loss, dscale, dbias = (torch.zeros_like(scale) for _ in range(3))
    x, y = wide(x, y)
    dx, dy = (t.new_zeros(t.shape) if gradients else t for t in (x, y))
    rows = max(16, BLOCK // max(1, len(y) * x.itemsize))
    for i in range(0, len(x), rows):
        here = slice(i, i + rows)
        products = x[here] @ y.T
        s = products * scale + bias
        positives = s.diagonal(i)[: rows if paired else 0]
        positives.neg_()  # s is -z s from here on
        loss -= F.logsigmoid(-s).sum()
        if gradients:
            ds = s.sigmoid_()
            positives.neg_()
            dbias += ds.sum()
            dscale += products.mul_(ds).sum()
            dx[here] = ds.mul_(scale) @ y
            dy.addmm_(ds.T, x[here])
    return loss, (dx, dy, dscale, dbias) if gradients else ()


def formula(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, start: int = 0) -> Tensor:
    """The sum over all pairs in plain PyTorch; row i of x matches row start + i of y."""
    x, y = wide(x, y)
    s = (x @ y.T) * scale + bias
    positive = torch.eye(len(y), dtype=torch.bool, device=x.device)[start : start + len(x)]
    return -F.logsigmoid(s.where(positive, -s)).sum()
