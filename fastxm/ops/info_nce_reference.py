"""InfoNCE in plain PyTorch: the whole similarity matrix, and its gradients."""

from functools import partial

import torch
from torch import Tensor

from fastxm.ops.dispatch import unit_rows, wide
from fastxm.ops.info_nce_rows import factors_of, finish, rnorms
from fastxm.ops.info_nce_sums import Forward, backward, new_sums
from fastxm.ops.vjp import vjp

__all__ = [
    "bwd",
    "differentiable_bwd",
    "differentiable_views_bwd",
    "finish",
    "fwd",
    "gradients",
    "losses",
    "rnorms",
    "sums",
    "views",
]


def _logits(x, y, a, b, row_labels, labels, offset) -> tuple[Tensor, Tensor, Tensor]:
    """s, which of it counts, and which of it is a positive, all [N, M]."""
    target = torch.arange(offset, offset + x.shape[0], device=x.device)
    positive = target[:, None] == torch.arange(y.shape[0], device=x.device)
    s = (x @ y.T) * a[:, None] * b
    keep = torch.ones_like(positive)
    if labels is not None:
        keep = positive | (row_labels[:, None] != labels)
    return s.masked_fill(~keep, -torch.inf), keep, positive


def _direction(s, keep, positive, smoothing, dim) -> tuple[Tensor, Tensor]:
    """The loss of every row (dim 1) or column (dim 0), and its statistics [3, ..]."""
    linear, lse = s.masked_fill(~keep, 0), s.logsumexp(dim)
    loss = lse - positive + smoothing * (positive - linear.sum(dim) / keep.sum(dim))
    with torch.no_grad():
        entropy = lse - (s.softmax(dim) * linear).sum(dim)
        return loss, torch.stack([lse, entropy, (positive >= s.amax(dim)).to(lse)])


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True) -> Forward:
    x, y = wide(x, y)
    kept = x.new_zeros(x.shape[0] if stored else 0, y.shape[0])
    none = x.new_empty(3, 0)
    if not y.shape[0]:
        return x.new_empty(0), none, none.clone(), kept
    own = None if labels is None else labels[offset : offset + x.shape[0]]
    s, keep, _ = _logits(x, y, a, b, own, labels, offset)
    positive = s.diagonal(offset)
    loss, row_stats = _direction(s, keep, positive, smoothing, 1)
    if not symmetric:
        return loss, row_stats, none, kept
    columns, column_stats = _direction(s, keep, positive, smoothing, 0)
    return (loss + columns) / 2, row_stats, column_stats, kept


def losses(x, y, scale, normalize, labels, *options) -> tuple[Tensor, ...]:
    """What `info_nce_op.losses` gives, differentiable to any order; options: those of `fwd`."""
    found = fwd(x, y, *factors_of(x, y, scale, normalize), labels, *options)
    return (*found, scale.new_empty(0))


def differentiable_bwd(
    dloss, x, y, scale, rnorms, labels, row_lse, column_lse, kept, *options
) -> list[Tensor | None]:
    """What `info_nce_op.gradients` gives as the formula's own, to be differentiated again."""
    rest = (rnorms.shape[0] > 0, labels, *options, False)
    return vjp(lambda *given: losses(*given, *rest)[0], (x, y, scale), (dloss,))


def sums(x, y, a, b, row_labels, labels, offset, stored, count=4) -> tuple[Tensor, Tensor, Tensor]:
    x, y = wide(x, y)
    s, keep, _ = _logits(x, y, a, b, row_labels, labels, offset)
    positive, found = s.new_zeros(1, x.shape[0]), s.diagonal(offset)
    positive[0, : len(found)] = found
    kept = s.new_zeros(x.shape[0] if stored else 0, y.shape[0])
    return torch.cat([_sums(s, keep, 1), positive]), _sums(s, keep, 0), kept


def _sums(s: Tensor, keep: Tensor, dim: int) -> Tensor:
    if not s.shape[dim]:
        return new_sums(s).repeat(1, s.shape[1 - dim])
    top = s.amax(dim)
    reference = torch.maximum(top, new_sums(s)[0])
    e, linear = (s - reference.unsqueeze(dim)).exp(), s.masked_fill(~keep, 0)
    parts = (e.sum(dim), (e * linear).sum(dim), linear.sum(dim))
    return torch.stack([reference, *parts, top])


def gradients(
    row, column, x, y, a, b, row_labels, labels, offset, smoothing, _kept
) -> tuple[Tensor, Tensor]:
    x, y = wide(x, y)
    s, keep, positive = _logits(x, y, a, b, row_labels, labels, offset)

    def of(lse, weight, even):
        return weight * ((s - lse).exp() - (1 - smoothing) * positive) - even * keep

    ds = of(*row[:, :, None])
    if column is not None:
        ds = ds + of(*column)
    g = ds * a[:, None] * b
    return g @ y, g.T @ x


bwd = partial(backward, gradients, finish)


def views(z: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """What `info_nce_views.losses` gives, differentiable to any order."""
    z = unit_rows(z) if normalize else wide(z)[0]
    s = (z @ z.T) * scale
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    lse = s.masked_fill(itself, -torch.inf).logsumexp(1)
    return lse - s.diagonal(z.shape[0] // 2).repeat(2), lse


def differentiable_views_bwd(dloss, z, scale, lse, normalize) -> list[Tensor | None]:
    return vjp(partial(views, normalize=normalize), (z, scale), (dloss, None))
