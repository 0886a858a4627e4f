"""What InfoNCE makes of rows one by one: their factors, and gradients through those.

r[i] = 1 / |x[i]|           a[i] = scale r[i], b[j] = r[N + j], or scale and 1
along[i] = <x[i], dx[i]>    dscale = sum_i along[i] / scale
dx[i] -= along[i] r[i]^2 x[i]   where rows count by their directions
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastxm.ops import dispatch

TINY = 1e-18  # stands for a scale of 0: gradients are divided by it, and stay exact
LONGEST = 999_999.0  # a longer r is of a row that is taken for one of length 1e-6


def rnorm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes the rows of x [N, D] unit rows, rsqrt(max(sum x^2, 1e-12)): [N], of a dtype."""
    return x.to(dtype).square().sum(-1).clamp_min(1e-12).rsqrt()


def rnorms(x: Tensor, y: Tensor) -> Tensor:
    """Those of the rows of x [N, D] and then of y [M, D]: [N + M], wide."""
    dtype = dispatch.wide_dtype(x, y)
    return torch.cat([rnorm(x, dtype), rnorm(y, dtype)])


def factors(x: Tensor, y: Tensor, scale: Tensor, rnorms: Tensor | None) -> tuple[Tensor, Tensor]:
    """a [N] and b [M], of which the logits are the products times a and b."""
    N, M = x.shape[0], y.shape[0]
    if rnorms is None:
        return scale.expand(N), torch.ones_like(scale).expand(M)
    return rnorms[:N] * scale, rnorms[N:]


def factors_of(x: Tensor, y: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The same, differentiable, on every rank by the same steps: cat's backward is another where
    there are no rows."""
    if not normalize:
        return factors(x, y, scale, None)
    return rnorm(x, scale.dtype) * scale, rnorm(y, scale.dtype)


def not_zero(scale: Tensor) -> Tensor:
    """A scale that gradients can be divided by."""
    return scale.masked_fill(scale == 0, TINY)


def finish(x: Tensor, dx: Tensor, rnorm: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of rows x [N, D], in their dtype, and along [N], wide.

    dx: g y, in a dtype no narrower; overwritten. rnorm: of rows that count by their directions.
    """
    along = inner(x, dx)
    if rnorm is not None:
        dx.addcmul_(x, (along * rnorm.masked_fill(rnorm > LONGEST, 0).square())[:, None], value=-1)
    return dx.to(x.dtype).contiguous(), along


def finish_both(
    finish: Callable, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, rnorms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and y, and along of x, by a backend's `finish`."""
    N = x.shape[0]
    dx, along = finish(x, dx, None if rnorms is None else rnorms[:N])
    dy = dy.to(y.dtype).contiguous() if rnorms is None else finish(y, dy, rnorms[N:])[0]
    return dx, dy, along


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, wide, a few rows at a time."""
    some = 1 << 14 if x.is_cuda else 1024
    parts = zip(x.split(some), y.split(some))
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.cat([torch.linalg.vecdot(p.to(wide), q.to(wide)) for p, q in parts])
