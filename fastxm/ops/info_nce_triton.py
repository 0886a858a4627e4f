"""InfoNCE by Triton, in O((N + M) D) memory: no logit of the forward leaves the registers.

The backward writes a strip of g, the gradient of the products, which two vendor products take on
to x and y: in x's dtype, but in float32 for float16, in which one pair of thousands would be 0.
"""

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm.ops import gemm
from fastxm.ops.dispatch import interpreting
from fastxm.ops.info_nce_blocks import TINY, inner
from fastxm.ops.info_nce_sums import Forward, backward, forward, join, new_sums

BAND = 8192  # rows, of each 128 of which the columns have sums of their own
STRIP = 256 << 20  # bytes of a strip of g
WAVES = 8  # programs a multiprocessor, or more: none waits long for the last


def _inputs(x, y, a, b, row_labels, labels) -> tuple[Tensor | None, ...]:
    """Rows of one dtype, in whole vectors of 16; factors; labels as numbers of 32 bits."""
    dtype, short = torch.promote_types(x.dtype, y.dtype), -x.shape[1] % 16
    rows = (F.pad(t.to(dtype), (0, short)) if short else t.to(dtype).contiguous() for t in (x, y))
    factors = (f.float().masked_fill(f == 0, TINY).contiguous() for f in (a, b))
    if labels is None:
        return (*rows, *factors, None, None)
    labels = torch.cat([row_labels, labels]).long()
    numbers = torch.searchsorted(labels.sort().values, labels).int()
    return (*rows, *factors, *numbers.split([len(x), len(y)]))


def _programs(x: Tensor) -> int:
    if interpreting():
        return WAVES
    return WAVES * torch.cuda.get_device_properties(x.device).multi_processor_count


def merge(parts: Tensor) -> Tensor:
    """Sums [5, n] of all parts from those of each, [3, parts, n] or [4, parts, n]."""
    top = parts[0].amax(0)
    exps = parts[1:3] * (parts[0] - top).exp()
    plain = parts[3].sum(0) if len(parts) > 3 else torch.zeros_like(top)
    return torch.stack([top, *exps.sum(1), plain, top])


def sums(
    x, y, a, b, row_labels, labels, offset, stored, columns=True, totals=True
) -> tuple[Tensor, Tensor, Tensor]:
    """As `info_nce_blocks.sums`; without those of columns or of s where they are not needed.

    Products are made again, whether they should be kept or not: what is kept is not written.
    """
    kernels = importlib.import_module("fastxm.kernels.info_nce")
    x, y, a, b, row_labels, labels = _inputs(x, y, a, b, row_labels, labels)
    N, M = len(x), len(y)
    row, column = a.new_zeros(6, N), new_sums(a).repeat(1, M)
    row[:5] = new_sums(a)
    with torch.cuda.device_of(x):
        for start in range(0, N if M else 0, BAND):
            here = slice(start, min(start + BAND, N))
            own = None if row_labels is None else row_labels[here]
            rows, strips, row[5, here] = kernels.stats(
                *(x[here], y, a[here], b, own, labels, offset + start),
                *(_programs(x), columns, totals, gemm.triton_precision()),
            )
            row[:5, here] = merge(rows)
            column = join(column, merge(strips)) if columns else column
    return row, column, a.new_empty(N if stored else 0, M)


def gradients(
    row, column, x, y, a, b, row_labels, labels, offset, smoothing, _kept, of_b=True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `info_nce_blocks.gradients`."""
    kernels, D = importlib.import_module("fastxm.kernels.info_nce"), x.shape[1]
    x, y, a, b, row_labels, labels = _inputs(x, y, a, b, row_labels, labels)
    of_x, of_y = (t.float() if t.dtype == torch.float16 else t for t in (x, y))
    N, M = len(x), len(y)
    dx, dy = a.new_zeros(x.shape), a.new_zeros(y.shape)
    width = -(-M // 16) * 16
    n = max(128, STRIP // max(1, width * of_x.element_size()) // 128 * 128)
    room = of_x.new_empty(min(n, N), width)[:, :M]
    with torch.cuda.device_of(x):
        for start in range(0, N if M else 0, n):
            here = slice(start, min(start + n, N))
            own, g = None if row_labels is None else row_labels[here], room[: here.stop - start]
            kernels.gradient(
                *(x[here], y, a[here], b, own, labels, row[:, here], column, g),
                *(offset + start, smoothing, gemm.triton_precision()),
            )
            dx[here] = _product(g, of_y)
            dy += _product(g.T, of_x[here])
    db = inner(y, dy) / b if of_b else b.new_empty(0)
    return dx[:, :D], dy[:, :D], inner(x, dx) / a, db


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y in float32."""
    return torch.mm(x, y) if x.dtype == torch.float32 else torch.mm(x, y, out_dtype=torch.float32)


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored) -> Forward:
    needed = partial(sums, columns=symmetric, totals=smoothing > 0)
    return forward(needed, x, y, a, b, labels, symmetric, smoothing, offset, stored)


bwd = partial(backward, gradients)
