"""InfoNCE in plain PyTorch: the whole similarity matrix, and its gradients."""

import torch
from torch import Tensor

from fastxm.ops.dispatch import vjp, wide

Forward = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, row_stats, column_stats, kept products


def _logits(x, y, a, b, labels, offset) -> tuple[Tensor, Tensor, Tensor]:
    """s [N, M], which of it counts [N, M], and the columns of the positives [N]."""
    target = torch.arange(offset, offset + len(x), device=x.device)
    s = (x @ y.T) * a[:, None] * b
    keep = torch.ones_like(s, dtype=torch.bool)
    if labels is not None:
        keep = labels[target, None] != labels
        keep = keep | (target[:, None] == torch.arange(len(y), device=x.device))
    return s.masked_fill(~keep, -torch.inf), keep, target


def _direction(s, keep, positive, smoothing, dim) -> tuple[Tensor, Tensor]:
    """The loss of every row (dim 1) or column (dim 0), and its statistics [3, ..]."""
    linear, lse = s.masked_fill(~keep, 0), s.logsumexp(dim)
    loss = lse - positive + smoothing * (positive - linear.sum(dim) / keep.sum(dim))
    with torch.no_grad():
        entropy = lse - (s.softmax(dim) * linear).sum(dim)
        return loss, torch.stack([lse, entropy, (positive >= s.amax(dim)).to(lse)])


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored) -> Forward:
    x, y = wide(x, y)
    kept = x.new_zeros(len(x) if stored else 0, len(y))
    none = x.new_empty(3, 0)
    if not len(x):
        return x.new_empty(0), none, none.expand(3, len(y) if symmetric else 0).clone(), kept
    s, keep, target = _logits(x, y, a, b, labels, offset)
    positive = s.gather(1, target[:, None])[:, 0]
    loss, row_stats = _direction(s, keep, positive, smoothing, 1)
    if not symmetric:
        return loss, row_stats, none, kept
    columns, column_stats = _direction(s, keep, positive, smoothing, 0)
    return (loss + columns) / 2, row_stats, column_stats, kept


def differentiable_bwd(
    dloss, x, y, a, b, labels, symmetric, smoothing, offset
) -> list[Tensor | None]:
    """The gradients as the formula's own, which can be differentiated again."""
    options = (labels, symmetric, smoothing, offset, False)
    return vjp(lambda x, y, a, b: fwd(x, y, a, b, *options)[0], (x, y, a, b), (dloss,))


def bwd(
    dloss, x, y, a, b, labels, row_lse, column_lse, _kept, symmetric, smoothing, offset
) -> tuple[Tensor, ...]:
    wide_x, wide_y = wide(x, y)
    s, keep, target = _logits(wide_x, wide_y, a, b, labels, offset)
    one_hot = torch.zeros_like(s).scatter_(1, target[:, None], 1 - smoothing)
    v = dloss[:, None] / 2 if symmetric else dloss[:, None]
    ds = v * ((s - row_lse[:, None]).exp() - one_hot - smoothing * keep / keep.sum(1, True))
    if symmetric:
        ds += v.T * ((s - column_lse).exp() - one_hot - smoothing * keep / keep.sum(0))
    products, g = wide_x @ wide_y.T, ds * a[:, None] * b
    da, db = (ds * b * products).sum(1), (ds * a[:, None] * products).sum(0)
    return (g @ wide_y).to(x.dtype), (g.T @ wide_x).to(y.dtype), da, db
