"""InfoNCE by the CUDA kernels of fastxm._C: by blocks, or a small problem in one launch each way.

The blocks of a small problem are a few dozen launches, which take longer than its work. Its own
kernel multiplies without tensor cores, and reads all of y for every eight rows of x: on an H200
that is some 4 N M D / 2e13 s forward, against 5e-6 s for each launch.
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch
from fastxm.ops import info_nce_blocks as blocks
from fastxm.ops.info_nce_blocks import gradients, sums
from fastxm.ops.info_nce_sums import Forward, backward, candidates

__all__ = ["bwd", "finish", "fwd", "gradients", "rnorms", "sums"]
SMALL = 512  # rows of y, and features: what the kernel has room for, and what is worth it
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def small(x: Tensor, y: Tensor) -> bool:
    """Whether a problem is small by its sizes alone."""
    return 0 < len(y) <= SMALL and 0 < x.shape[1] <= SMALL


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True) -> Forward:
    if stored or not small(x, y):
        return blocks.fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored)
    (N, M), inputs = (len(x), len(y)), _inputs(x, y, a, b, labels, smoothing, offset)
    empty = inputs[2].new_empty
    loss, row, column = empty(N), empty(3, N), empty(3, M if symmetric else 0)
    launch(inputs, offset, smoothing, loss, row, column if symmetric else None)
    return loss, row, column, empty(0, M)


def bwd(
    dloss, x, y, a, b, rnorms, labels, row_lse, column_lse, kept, symmetric, smoothing, offset
) -> tuple[Tensor, Tensor, Tensor]:
    if len(kept) or not small(x, y):
        given = (rnorms, labels, row_lse, column_lse, kept, symmetric, smoothing, offset)
        return backward(gradients, finish, dloss, x, y, a, b, *given)
    inputs = _inputs(x, y, a, b, labels, smoothing, offset)
    wide = inputs[2].dtype
    dloss, row_lse, column_lse = (t.to(wide).contiguous() for t in (dloss, row_lse, column_lse))
    grads = [torch.empty_like(t) for t in inputs[:3]]
    lses = row_lse, column_lse if symmetric else None
    launch(inputs, offset, smoothing, dloss, *lses, rnorms, *grads)
    dx, dy, along = grads
    return dx.to(x.dtype), dy.to(y.dtype), along


def rnorms(x: Tensor, y: Tensor) -> Tensor:
    """As `info_nce_rows.rnorms`, in one launch."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = (t.to(dtype).contiguous() for t in (x, y))
    out = x.new_empty(len(x) + len(y), dtype=dispatch.wide_dtype(x))
    sizes, addresses = (DTYPES[dtype], len(x), *y.shape), (t.data_ptr() for t in (x, y, out))
    with torch.cuda.device_of(x):
        _C.info_nce_rnorms_cuda(sizes, *addresses, blocks.stream(x))
    return out


def finish(x: Tensor, dx: Tensor, rnorm: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `info_nce_rows.finish`, in one launch."""
    along, dtype = dx.new_empty(len(x)), x.dtype
    x = x.to(dx.dtype if dx.dtype == torch.float64 else dtype).contiguous()
    out, sizes = torch.empty_like(x), (DTYPES[x.dtype], *x.shape, dx.stride(0))
    tensors = (x, dx, rnorm, out, along)
    with torch.cuda.device_of(x):
        _C.info_nce_finish_cuda(
            sizes, tuple(0 if t is None else t.data_ptr() for t in tensors), blocks.stream(x)
        )
    return out.to(dtype), along


def _inputs(x, y, a, b, labels, smoothing, offset) -> tuple:
    """x and y of one dtype, a and b wide, labels of rows and of columns, counts of candidates."""
    wide, dtype = dispatch.wide_dtype(x, y), torch.promote_types(x.dtype, y.dtype)
    rows = (t.to(dtype).contiguous() for t in (x, y))
    factors = (t.to(wide).contiguous() for t in (a, b))
    if labels is None:
        return (*rows, *factors, None, None, None)
    labels = labels.long().contiguous()
    count = candidates(labels, len(x), len(y), offset) if smoothing else None
    counts = count.to(wide) if isinstance(count, Tensor) else None
    return (*rows, *factors, labels[offset:], labels, counts)


def launch(inputs: tuple, offset: int, smoothing: float, *more: Tensor | None) -> None:
    """The one kernel of a pass. more: loss and statistics; or their cotangents, `rnorms`, and
    gradients."""
    x, y = inputs[:2]
    sizes = (DTYPES[x.dtype], len(x), len(y), x.shape[1], offset)
    addresses = [0 if t is None else t.data_ptr() for t in (*inputs, *more)]
    addresses += [0] * (14 - len(addresses))
    with torch.cuda.device_of(x):
        _C.info_nce_small_cuda(sizes, addresses, smoothing, blocks.stream(x))
