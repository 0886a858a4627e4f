"""Kernel MMD: the distance of two distributions from their samples, in O(N D) memory.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

"biased" takes the means over all pairs; "unbiased" leaves k(x_i, x_i) and k(y_i, y_i) out;
"u_statistic" k(x_i, y_i) too; "linear" averages h over disjoint neighbours and "block" the
u_statistic over blocks of ceil(sqrt(N)) rows, where

    h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

Gretton et al. 2012 (JMLR 13, and NIPS for "linear"); Zaremba et al. 2013 for "block".
"""

import math

import torch.distributed as dist
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.mmd_checks import chosen, problem
from fastxm.ops.mmd_kernels import (
    RBF,
    Energy,
    Kernel,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
)
from fastxm.ops.mmd_means import coefficients, of_ranks, sums_of

__all__ = ["DEFAULT", "RBF", "Energy", "Kernel", "Laplace", "Linear", "Polynomial",
           "RationalQuadratic", "mmd2"]  # fmt: skip

DEFAULT = RBF((1, 2, 4, 8, 16))


def mmd2(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    estimator: str = "biased",
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    x_starts: Tensor | None = None,
    y_starts: Tensor | None = None,
    block_size: int | None = None,
    precision: str | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Squared maximum mean discrepancy of two samples, or of many pairs of samples at once.

    Values and gradients take O((N + M) D) memory; second derivatives and forward mode O(N M).

    Args:
        x, y: [N, D] and [M, D], any floating dtype; or [G, N, D] and [G, M, D], G problems.
        kernel: a kernel or a sum of kernels; gradients reach its bandwidths.
        estimator: "biased", "unbiased", "u_statistic", "linear" or "block"; the last three need
            N = M. All may be negative, "biased" by no more than rounding.
        x_weight, y_weight: [N] and [M] ([G, N] and [G, M]), at least 0 and not all 0, weights of
            the rows, only in proportion; for "biased" and "unbiased" (two rows that are not 0).
        x_starts, y_starts: [G + 1] integers from 0 to N and to M, where the rows of each of G
            problems begin and the last one's end (cu_seqlens); not for "linear" and "block".
            They are read: torch.compile breaks its graph there.
        block_size: rows a block for "block", ceil(sqrt(N)) unless given.
        precision: of the products: "float32", "bfloat16", or on a GPU "tf32" or "tf32x3" (three
            products of TF32). None: bfloat16 where both x and y are; else float32 (float64). Of a
            group only Triton heeds it, and bfloat16 rows on a GPU are multiplied as float32.
        group: a torch.distributed group: each rank gives its own rows (as many of x as of y for
            "u_statistic") and has the MMD of those of all, of one problem. Gradients of rows are
            those of the sum of the ranks' results, so that DistributedDataParallel's average is
            right; those of bandwidths are whole on every rank. Not for "linear" and "block".

    Returns:
        a scalar, or [G]; float32 (float64 for float64 inputs), under autocast too.

    Raises:
        ValueError: shapes, too few rows, or options that do not fit.
        TypeError: x or y of no floating dtype, a kernel that is none, or tensors of several
            devices.
    """
    given = (kernel, estimator, x_weight, y_weight, x_starts, y_starts)
    p = problem(x, y, *given, least=None if group is None else 0)
    precision = chosen(precision, x, y)
    if block_size is not None and estimator != "block":
        raise ValueError(f"block_size is for estimator 'block', not {estimator!r}")
    if group is not None and (p.x_starts is not None or estimator in ("linear", "block")):
        raise ValueError(f"a group takes one problem, and not estimator {estimator!r}")
    with no_autocast(x):
        if estimator == "linear":
            x, y = dispatch.wide(x, y)
            return _linear(x, y, kernel)
        if estimator == "block":
            return _block(x, y, kernel, block_size, precision)
        drop = (estimator != "biased", estimator == "u_statistic")
        if group is not None:
            return of_ranks(p, kernel, drop, precision, group)
        c = coefficients(p.a.double(), p.b.double(), p.x_starts, p.y_starts, *drop)
        total = sums_of(p, kernel, c, drop, precision)
    return total if p.x_starts is not None else total[0]


def _linear(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    n = x.shape[-2] // 2 * 2
    x0, x1, y0, y1 = (z[..., i:n:2, :] for z in (x, y) for i in (0, 1))
    h = kernel.paired(x0, x1) + kernel.paired(y0, y1)
    return (h - kernel.paired(x0, y1) - kernel.paired(x1, y0)).mean(-1)


def _block(x: Tensor, y: Tensor, kernel: Kernel, size: int | None, precision: str) -> Tensor:
    N = x.shape[-2]
    size = math.ceil(math.sqrt(N)) if size is None else size
    if not 2 <= size <= N:
        raise ValueError(f"block_size must be 2 to N = {N}, not {size}")
    u, v = (z[..., : N // size * size, :].reshape(-1, size, z.shape[-1]) for z in (x, y))
    each = mmd2(u, v, kernel, estimator="u_statistic", precision=precision)
    return each.unflatten(0, (*x.shape[:-2], -1)).mean(-1)
