"""Weighted sums of a kernel over pairs: what the quadratic estimators of MMD are made from.

S = c[0] sum a[i] a[j] k(x[i], x[j]) + c[1] sum b[i] b[j] k(y[i], y[j])
  + c[2] sum a[i] b[j] k(x[i], y[j])
"""

import torch
from torch import Tensor

from fastxm.ops.mmd_pairs import distances, off_diagonal, value


def kernel_sum(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    parameters: Tensor,
    kind: str,
    degree: int,
    drop_self: bool,
    drop_paired: bool,
) -> Tensor:
    """S of the module docstring.

    Args:
        x, y: [N, D] and [M, D], float32 or float64, centred for a radial kernel.
        a, b: [N] and [M], weights of the rows.
        c: [3], coefficients of the three sums.
        parameters, kind, degree: the kernel (see mmd_pairs).
        drop_self: leaves pairs of a row with itself out of the first two sums.
        drop_paired: leaves the pairs i = j out of the third.
    """
    return _formula(x, y, a, b, c, parameters, kind, degree, drop_self, drop_paired)


def _formula(x, y, a, b, c, parameters, kind, degree, drop_self, drop_paired) -> Tensor:
    def total(x: Tensor, y: Tensor, a: Tensor, b: Tensor, same: bool, drop: bool) -> Tensor:
        s = x @ y.mT if kind == "polynomial" else distances(x, y, same)
        k = value(kind, s, parameters, degree)
        return a @ (k * off_diagonal(k) if drop else k) @ b

    sums = (total(x, x, a, a, True, drop_self), total(y, y, b, b, True, drop_self),
            total(x, y, a, b, False, drop_paired))  # fmt: skip
    return c @ torch.stack(sums)
