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
from fastxm.ops.info_nce_sums import Forward, backward, forward, new_sums

BAND = 16384  # rows, of each 16 or 32 of which the columns have sums of their own
STRIP = 8192  # rows of g, of which vendor products keep a GPU busy
ROOM = 1 << 30  # bytes of g, of which fewer rows are made if it has many columns
WAVES = 16  # programs a multiprocessor, or more: none waits long for the last


def _inputs(x, y, a, b, row_labels, labels) -> tuple[Tensor | None, ...]:
    """Rows of one dtype, in whole vectors of 16; factors of rows and columns, or one of all pairs
    and None; labels as numbers of 32 bits."""
    dtype, short = torch.promote_types(x.dtype, y.dtype), -x.shape[1] % 16
    rows = (F.pad(t.to(dtype), (0, short)) if short else t.to(dtype).contiguous() for t in (x, y))
    if len(a) and len(b) and a.stride(0) == b.stride(0) == 0:
        factors = [a[:1].float() * b[:1].float(), None]
    else:
        factors = [f.float().contiguous() for f in (a, b)]
    if labels is None:
        return (*rows, *factors, None, None)
    labels = torch.cat([row_labels, labels]).long()
    numbers = torch.searchsorted(labels.sort().values, labels).int()
    return (*rows, *factors, *numbers.split([len(x), len(y)]))


def _programs(x: Tensor) -> int:
    if interpreting():
        return WAVES
    return WAVES * torch.cuda.get_device_properties(x.device).multi_processor_count


def sums(
    x, y, a, b, row_labels, labels, offset, stored, count=4, columns=True
) -> tuple[Tensor, Tensor, Tensor]:
    """As `info_nce_blocks.sums`; without those of columns where they are not needed, and of the
    sums the first `count`: 4, 3 without those of s, or 2 without those of e s and the maxima.

    Products are made again, whether they should be kept or not: what is kept is not written.
    """
    kernels = importlib.import_module("fastxm.kernels.info_nce")
    merge = importlib.import_module("fastxm.kernels.info_nce_merge").merge
    N, M = len(x), len(y)
    x, y, a, b, row_labels, labels = _inputs(x, y, a, b, row_labels, labels)
    row, column = a.new_zeros(6, N), new_sums(a).repeat(1, M)
    row[:5] = new_sums(a)
    with torch.cuda.device_of(x):
        for start in range(0, N if M else 0, BAND):
            here = slice(start, min(start + BAND, N))
            rows, strips, row[5, here] = kernels.stats(
                *(x[here], y, a if b is None else a[here], b),
                *(None if row_labels is None else row_labels[here], labels, offset + start),
                *(_programs(x), columns, count, gemm.triton_precision()),
            )
            merge(*rows, row[:5, here], count)
            if columns:
                merge(*strips, column, count)
    return row, column, a.new_empty(N if stored else 0, M)


def gradients(
    row, column, x, y, a, b, row_labels, labels, offset, smoothing, _kept
) -> tuple[Tensor, Tensor]:
    """As `info_nce_blocks.gradients`."""
    gradient = importlib.import_module("fastxm.kernels.info_nce_gradient").gradient
    D = x.shape[1]
    x, y, a, b, row_labels, labels = _inputs(x, y, a, b, row_labels, labels)
    of_x, of_y = (t.float() if t.dtype == torch.float16 else t for t in (x, y))
    N, M = len(x), len(y)
    dx, dy = (a.new_empty(t.shape) if N and M else a.new_zeros(t.shape) for t in (x, y))
    width = -(-M // 16) * 16
    n = max(128, min(STRIP, ROOM // max(1, width * of_x.element_size())) // 128 * 128)
    room = of_x.new_empty(min(n, N), width)[:, :M]
    if N and M:
        row, column, bounds = _weights(row, column, a if b is None else None)
    with torch.cuda.device_of(x):
        for start in range(0, N if M else 0, n):
            here = slice(start, min(start + n, N))
            g = room[: here.stop - start]
            gradient(
                *(x[here], y, a if b is None else a[here], b),
                *(None if row_labels is None else row_labels[here], labels),
                *(row[:, here], column, bounds, g),
                *(offset + start, smoothing, gemm.triton_precision()),
            )
            gemm.multiply(g, of_y, dx[here])
            if start:
                gemm.accumulate(dy, g.T, of_x[here])
            else:
                gemm.multiply(g.T, of_x[here], dy)
    return dx[:, :D], dy[:, :D]


def rnorms(x: Tensor, y: Tensor) -> Tensor:
    """As `info_nce_rows.rnorms`."""
    kernels = importlib.import_module("fastxm.kernels.info_nce_rows")
    out = x.new_empty(len(x) + len(y), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for rows, of in zip((x, y), out.split([len(x), len(y)])):
            kernels.rnorms(rows.contiguous(), of)
    return out


def finish(x: Tensor, dx: Tensor, rnorm: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `info_nce_rows.finish`."""
    kernels = importlib.import_module("fastxm.kernels.info_nce_rows")
    x = x.contiguous()
    out, along = torch.empty_like(x), dx.new_empty(len(x))
    with torch.cuda.device_of(x):
        kernels.finish(x, dx, rnorm, out, along)
    return out, along


def _weights(row, column, factor) -> tuple[Tensor, Tensor | None, Tensor]:
    """`terms` and the weights of exp(s - the largest log-sum-exp), all times the factor of all
    pairs if there is one; and the largest and the least log-sum-exp."""
    both = [t for t in (row, column) if t is not None]
    bounds = torch.stack(torch.cat([t[0] for t in both]).aminmax()).flip(0)
    for k, t in enumerate(both):
        both[k] = torch.cat([t, (t[1] * (bounds[0] - t[0]).exp())[None]])
        if factor is not None:
            both[k][1:] *= factor
    return both[0], None if column is None else both[1], bounds


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True) -> Forward:
    count = 4 if smoothing else 3 if metrics else 2
    needed = partial(sums, count=count, columns=symmetric)
    return forward(needed, x, y, a, b, labels, symmetric, smoothing, offset, stored)


bwd = partial(backward, gradients, finish)
