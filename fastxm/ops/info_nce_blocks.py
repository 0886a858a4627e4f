"""The two ways to InfoNCE: the whole similarity matrix in plain PyTorch, and blocks of its rows."""

import torch
from torch import Tensor

from fastxm.ops.dispatch import wide


def _logits(x, y, scale, labels, offset) -> tuple[Tensor, Tensor, Tensor]:
    """s [N, M], which of it counts [N, M], and the columns of the positives [N]."""
    target = torch.arange(offset, offset + len(x), device=x.device)
    s = scale * x @ y.T
    keep = torch.ones_like(s, dtype=torch.bool)
    if labels is not None:
        keep = labels[target, None] != labels
        keep = keep | (target[:, None] == torch.arange(len(y), device=x.device))
    return s.masked_fill(~keep, -torch.inf), keep, target


def formula(x, y, scale, labels, symmetric, smoothing, offset) -> tuple[Tensor, Tensor, Tensor]:
    x, y = wide(x, y)
    s, keep, target = _logits(x, y, scale, labels, offset)
    positive = (1 - smoothing) * s.gather(1, target[:, None])[:, 0]
    row_lse = s.logsumexp(1)
    linear = s.masked_fill(~keep, 0)
    loss = row_lse - positive - smoothing * linear.sum(1) / keep.sum(1)
    if not symmetric:
        return loss, row_lse, s.new_empty(0)
    column_lse = s.logsumexp(0)
    columns = column_lse - positive - smoothing * linear.sum(0) / keep.sum(0)
    return (loss + columns) / 2, row_lse, column_lse


def formula_bwd(
    dloss, x, y, scale, labels, row_lse, column_lse, symmetric, smoothing, offset
) -> tuple[Tensor, Tensor, Tensor]:
    wide_x, wide_y = wide(x, y)
    s, keep, target = _logits(wide_x, wide_y, scale, labels, offset)
    one_hot = torch.zeros_like(s).scatter_(1, target[:, None], 1 - smoothing)
    a = dloss[:, None] / 2 if symmetric else dloss[:, None]
    ds = a * ((s - row_lse[:, None]).exp() - one_hot - smoothing * keep / keep.sum(1, True))
    if symmetric:
        ds += a.T * ((s - column_lse).exp() - one_hot - smoothing * keep / keep.sum(0))
    dx = ds @ wide_y
    dscale = (wide_x * dx).sum()
    return (scale * dx).to(x.dtype), (scale * ds.T @ wide_x).to(y.dtype), dscale
