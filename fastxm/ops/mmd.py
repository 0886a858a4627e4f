"""Kernel MMD: the distance of two distributions from their samples, in O(N D) memory.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

"biased" takes the means over all pairs; "unbiased" leaves k(x_i, x_i) and k(y_i, y_i) out;
"u_statistic" k(x_i, y_i) too; "linear" averages h over disjoint neighbours and "block" the
u_statistic over blocks of ceil(sqrt(N)) rows, where

    h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

Gretton et al. 2012 (JMLR 13, and NIPS for "linear"); Zaremba et al. 2013 for "block".
"""

import math

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.mmd_kernels import (
    RBF,
    Energy,
    Kernel,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
)
from fastxm.ops.mmd_pairs import off_diagonal
from fastxm.ops.mmd_sums import kernel_sum

__all__ = ["DEFAULT", "RBF", "Energy", "Kernel", "Laplace", "Linear", "Polynomial",
           "RationalQuadratic", "centred", "check", "mmd2"]  # fmt: skip

ESTIMATORS = ("biased", "unbiased", "u_statistic", "linear", "block")
DEFAULT = RBF((1, 2, 4, 8, 16))


def mmd2(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    estimator: str = "biased",
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy of two samples.

    Values and gradients take O((N + M) D) memory; second derivatives (create_graph) O(N M).

    Args:
        x, y: [N, D] and [M, D], any floating dtype.
        kernel: a kernel or a sum of kernels; gradients reach its bandwidths.
        estimator: "biased" (never below 0), "unbiased", "u_statistic", "linear" or "block"; the
            last three need N = M. All but "biased" may be negative.
        x_weight, y_weight: [N] and [M], at least 0, weights of the rows, only in proportion; for
            "biased" and "unbiased".
        block_size: rows a block for "block", ceil(sqrt(N)) unless given.

    Returns:
        a scalar, float32 (float64 for float64 inputs), under autocast too.

    Raises:
        ValueError: shapes, too few rows, or an estimator that is none of these.
        TypeError: x or y of no floating dtype, a kernel that is none, or tensors of several
            devices.
    """
    check(x, y, kernel, estimator, x_weight, y_weight)
    with torch.autocast(x.device.type, enabled=False):
        x, y = dispatch.wide(x, y)
        if estimator == "linear":
            return _linear(x, y, kernel)
        if estimator == "block":
            return _block(x, y, kernel, block_size or math.ceil(math.sqrt(len(x))))
        drop = (estimator != "biased", estimator == "u_statistic")
        a = x.new_ones(len(x)) if x_weight is None else x_weight.to(x)
        b = y.new_ones(len(y)) if y_weight is None else y_weight.to(y)
        c = _coefficients(a.double(), b.double(), *drop)
        total = x.new_zeros(())
        for k in kernel.terms:
            u, v = centred(x, y) if k.radial else (x, y)
            total = total + kernel_sum(u, v, a, b, c, k.parameters(x), k.kind, k.degree, *drop)
        return total


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y less the mean of all rows: distances stay, and lose less to rounding."""
    centre = (x.detach().sum(0) + y.detach().sum(0)) / (len(x) + len(y))
    return x - centre, y - centre


def _coefficients(a: Tensor, b: Tensor, drop_self: bool, drop_paired: bool) -> Tensor:
    """One over the sum of the weights of the pairs in each of the three means, -2 over the last."""
    xx, yy, xy = a.sum().square(), b.sum().square(), a.sum() * b.sum()
    if drop_self:
        xx, yy = xx - a.square().sum(), yy - b.square().sum()
    if drop_paired:
        xy = xy - (a * b).sum()
    return torch.stack([1 / xx, 1 / yy, -2 / xy])


def _linear(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    n = len(x) // 2 * 2
    x0, x1, y0, y1 = x[0:n:2], x[1:n:2], y[0:n:2], y[1:n:2]
    h = kernel.paired(x0, x1) + kernel.paired(y0, y1)
    return (h - kernel.paired(x0, y1) - kernel.paired(x1, y0)).mean()


def _block(x: Tensor, y: Tensor, kernel: Kernel, size: int) -> Tensor:
    if not 2 <= size <= len(x):
        raise ValueError(f"block_size must be 2 to N = {len(x)}, not {size}")
    n = len(x) // size * size
    x, y = centred(x, y) if all(k.radial for k in kernel.terms) else (x, y)
    x, y = x[:n].unflatten(0, (-1, size)), y[:n].unflatten(0, (-1, size))  # [blocks, size, D]
    xy = kernel.matrix(x, y)
    h = kernel.matrix(x, x, same=True) + kernel.matrix(y, y, same=True) - xy - xy.mT
    return (h * off_diagonal(h)).sum() / (n * (size - 1))


def check(x, y, kernel, estimator="biased", x_weight=None, y_weight=None) -> None:
    """Raises ValueError or TypeError unless mmd2 takes these arguments."""
    dispatch.one_device("mmd2", x, y, x_weight, y_weight)
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(f"mmd2 needs floating x and y, not {x.dtype} and {y.dtype}")
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel is one of fastxm.ops.mmd or a sum of them, not {kernel!r}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"mmd2 needs x [N, D] and y [M, D], not {[*x.shape]} and {[*y.shape]}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is one of {', '.join(ESTIMATORS)}, not {estimator!r}")
    least = 1 if estimator == "biased" else 2
    if min(len(x), len(y)) < least or x.shape[1] < 1:
        raise ValueError(f"estimator {estimator!r} needs {least} rows or more of one feature or "
                         f"more, not {[*x.shape]} and {[*y.shape]}")  # fmt: skip
    if estimator not in ("biased", "unbiased"):
        if len(x) != len(y):
            raise ValueError(f"estimator {estimator!r} needs N = M, not {len(x)} and {len(y)}")
        if x_weight is not None or y_weight is not None:
            raise ValueError(f"estimator {estimator!r} takes no weights")
    for weight, rows in ((x_weight, x), (y_weight, y)):
        if weight is not None and weight.shape != rows.shape[:1]:
            raise ValueError(f"weights must be [{len(rows)}], one a row, not {[*weight.shape]}")
