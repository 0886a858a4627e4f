"""InfoNCE's sums over the logits of a row or a column, from any part of them to the loss.

Sums [5, n] of n rows or columns: a reference, the sums of e = exp(s - reference), of e s and of s,
and the maximum of s. Those of two parts join to those of both, so that a backend has two functions
of any rows x and y: `sums`, and `gradients` of what `terms` makes of all sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastxm.ops.info_nce_rows import finish_both

Forward = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, row_stats, column_stats, kept products


def new_sums(column: Tensor) -> Tensor:
    """Sums [5, 1] of nothing; the reference is below every other, and a number."""
    sums = column.new_zeros(5, 1)
    sums[0].fill_(-1e30)
    sums[4].fill_(-torch.inf)
    return sums


def join(p: Tensor, q: Tensor) -> Tensor:
    """Sums [5, n] over two parts."""
    reference = torch.maximum(p[0], q[0])
    less_p, less_q = (p[0] - reference).exp(), (q[0] - reference).exp()
    exps = p[1:3] * less_p + q[1:3] * less_q
    top = torch.maximum(p[4], q[4])
    return torch.cat([reference[None], exps, (p[3] + q[3])[None], top[None]])


def candidates(labels: Tensor | None, N: int, M: int, offset: int) -> Tensor | int:
    """How many columns each row chooses from: the positive, and all that have other labels."""
    if labels is None:
        return max(M, 1)
    ordered, own = labels.sort().values, labels[offset : offset + N]
    # unlike unique, nothing here waits for a GPU
    same = torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)
    return M + 1 - same


def finish(sums: Tensor, positive: Tensor, smoothing: float, count) -> tuple[Tensor, Tensor]:
    """Losses [n] and statistics [3, n]: log-sum-exp, entropy, whether the positive was found."""
    lse = sums[0] + sums[1].log()
    loss = lse - positive
    if smoothing:
        loss = loss + smoothing * (positive - sums[3] / count)
    return loss, torch.stack([lse, lse - sums[2] / sums[1], (positive >= sums[4]).to(lse)])


def terms(lse: Tensor, weight: Tensor, smoothing: float, count) -> Tensor:
    """What the backward takes of rows or columns [3, n]: also the weight of every entry."""
    return torch.stack([lse, weight, smoothing * weight / count])


def forward(
    sums: Callable, x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True
) -> Forward:
    N, M = len(x), len(y)
    own = None if labels is None else labels[offset : offset + N]
    row, column, kept = sums(x, y, a, b, own, labels, offset, stored)
    count = candidates(labels, N, M, offset) if smoothing else 1
    loss, row_stats = finish(row[:5], row[5], smoothing, count)
    if not symmetric:
        return loss, row_stats, row.new_empty(3, 0), kept
    columns, column_stats = finish(column, row[5], smoothing, count)
    return (loss + columns) / 2, row_stats, column_stats, kept


def backward(
    gradients: Callable, finish: Callable, dloss, x, y, a, b, rnorms, labels, row_lse, column_lse,
    kept, symmetric, smoothing, offset
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy, and along of x (see info_nce_rows)."""
    N, M = len(x), len(y)
    own = None if labels is None else labels[offset : offset + N]
    count = candidates(labels, N, M, offset) if smoothing else 1
    weight = dloss / 2 if symmetric else dloss
    row = terms(row_lse, weight, smoothing, count)
    column = terms(column_lse, weight, smoothing, count) if symmetric else None
    dx, dy = gradients(row, column, x, y, a, b, own, labels, offset, smoothing, kept)
    return finish_both(finish, x, y, dx, dy, rnorms)
