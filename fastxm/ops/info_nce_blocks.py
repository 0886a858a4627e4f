"""The two ways to InfoNCE: the whole similarity matrix in plain PyTorch, and blocks of its rows.

Of each block the vendor's matrix product makes the logits and the C++ epilogue everything else, so
memory is that of one block and a few vectors. Few logits are kept for the backward: that saves one
of its three products.
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops.dispatch import choose, threads, vjp, wide

BLOCK = 1 << 20  # logits of a block: 4 MB of float32, which the last cache level holds
Forward = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, row_lse, column_lse, kept logits
KEPT = 1 << 22  # logits that are kept, at most: 16 MB of float32


def backend(x: Tensor) -> str:
    auto = "cpu" if x.device.type == "cpu" else "reference"
    return choose("info_nce", x.device, auto, ("reference", "cpu"))


def kept_shape(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """The shape of the logits that the forward keeps: all or nothing."""
    few = x.device.type == "cpu" and len(x) * len(y) <= KEPT
    return (len(x), len(y)) if few else (0, 0)


def _logits(x, y, scale, labels, offset) -> tuple[Tensor, Tensor, Tensor]:
    """s [N, M], which of it counts [N, M], and the columns of the positives [N]."""
    target = torch.arange(offset, offset + len(x), device=x.device)
    s = scale * x @ y.T
    keep = torch.ones_like(s, dtype=torch.bool)
    if labels is not None:
        keep = labels[target, None] != labels
        keep = keep | (target[:, None] == torch.arange(len(y), device=x.device))
    return s.masked_fill(~keep, -torch.inf), keep, target


def formula(x, y, scale, labels, symmetric, smoothing, offset) -> Forward:
    x, y = wide(x, y)
    s, keep, target = _logits(x, y, scale, labels, offset)
    positive = s.gather(1, target[:, None])[:, 0]
    row_lse = s.logsumexp(1)
    linear = s.masked_fill(~keep, 0)
    loss = row_lse - positive + smoothing * (positive - linear.sum(1) / keep.sum(1))
    kept = s if kept_shape(x, y) == s.shape else s.new_empty(0, 0)
    if not symmetric:
        return loss, row_lse, s.new_empty(0), kept
    column_lse = s.logsumexp(0)
    columns = column_lse - positive + smoothing * (positive - linear.sum(0) / keep.sum(0))
    return (loss + columns) / 2, row_lse, column_lse, kept


def formula_bwd(
    dloss, x, y, scale, labels, row_lse, column_lse, kept, symmetric, smoothing, offset
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


def formula_vjp(dloss, x, y, scale, labels, *options) -> list[Tensor | None]:
    """The gradients as the formula's own, which can be differentiated again."""
    return vjp(lambda x, y, s: formula(x, y, s, labels, *options)[0], (x, y, scale), (dloss,))


def _blocks(x, y):
    """Yields the rows of each block, as a slice, and room for its logits, shared by all."""
    rows = max(16, BLOCK // max(len(y), 1))
    room = x.new_empty(min(rows, len(x)), len(y))
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        yield slice(start, stop), room[: stop - start]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _candidates(labels, x, y, offset) -> Tensor | int:
    """How many columns each row chooses from: the positive, and all that have other labels."""
    if labels is None:
        return max(len(y), 1)
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return len(y) + 1 - counts[inverse[offset : offset + len(x)]]


def fwd(x, y, scale, labels, symmetric, smoothing, offset) -> Forward:
    x, y = wide(x, y)
    labels = None if labels is None else labels.long().contiguous()
    row = x.new_empty(3, len(x))
    column = x.new_tensor([-torch.inf, 0, 0])[:, None].repeat(1, len(y)) if symmetric else None
    scaled, kept = scale * x, x.new_empty(kept_shape(x, y))
    for here, s in _blocks(x, y):
        s = kept[here] if len(kept) else s
        torch.mm(scaled[here], y.T, out=s)
        _C.info_nce_fwd_cpu(
            *(s.dtype == torch.float64, s.data_ptr(), *s.shape, offset + here.start),
            *(_address(labels), row[:, here].data_ptr(), len(x), _address(column)),
            *(smoothing > 0, threads()),
        )
    row_lse, positive, total = row
    candidates = _candidates(labels, x, y, offset) if smoothing else 1
    loss = row_lse - positive + smoothing * (positive - total / candidates)
    if column is None:
        return loss, row_lse.clone(), x.new_empty(0), kept
    column_lse = column[0] + column[1].log()
    columns = column_lse - positive + smoothing * (positive - column[2] / candidates)
    return (loss + columns) / 2, row_lse.clone(), column_lse, kept


def bwd(
    dloss, x, y, scale, labels, row_lse, column_lse, kept, symmetric, smoothing, offset
) -> tuple[Tensor, Tensor, Tensor]:
    wide_x, wide_y = wide(x, y)
    labels = None if labels is None else labels.long().contiguous()
    weight = dloss / 2 if symmetric else dloss
    even = smoothing * weight / _candidates(labels, x, y, offset)
    row = torch.stack([row_lse, weight, even])
    column = torch.stack([column_lse, weight, even]) if symmetric else None
    dx, dy = torch.empty_like(wide_x), torch.zeros_like(wide_y)
    scaled = scale * wide_x
    for here, s in _blocks(wide_x, wide_y):
        if len(kept):
            s.copy_(kept[here])
        else:
            torch.mm(scaled[here], wide_y.T, out=s)
        _C.info_nce_bwd_cpu(
            *(s.dtype == torch.float64, s.data_ptr(), *s.shape, offset + here.start),
            *(_address(labels), row[:, here].data_ptr(), len(x), _address(column)),
            *(smoothing, threads()),
        )
        torch.mm(s, wide_y, out=dx[here])
        dy.addmm_(s.T, wide_x[here])
    dscale = (wide_x * dx).sum()
    return dx.mul_(scale).to(x.dtype), dy.mul_(scale).to(y.dtype), dscale
