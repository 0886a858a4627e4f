"""The variance of the unbiased estimate of MMD^2, for tests and their power."""

from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.mmd_checks import problem, stated
from fastxm.ops.mmd_kernels import Kernel
from fastxm.ops.mmd_moments import moments
from fastxm.ops.mmd_rows import centred


def mmd2_and_variance(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Unbiased MMD^2 and an unbiased estimate of the variance of it, for tests and their power.

    Memory is O(N D); second derivatives and forward mode take O(N^2).

    Args:
        x, y: [N, D], N >= 4, any floating dtype.
        kernel: see mmd2. For kernels learned by power, maximise mmd2 / sqrt(max(variance, 1e-8)).

    Returns:
        two scalars, float32 (float64 for float64 inputs), differentiable to any order. The
        estimate of the variance may be negative.

    Raises:
        ValueError: N and M differ, or fewer than 4 rows.

    Source: Sutherland et al. 2017 (ICLR), in the sums a = Kxx 1, b = Kyy 1, p = Kxy 1, q = Kxy' 1,
    diagonals of Kxx and Kyy zero.
    """
    problem(x, y, kernel, "u_statistic", one=True)
    m = x.shape[0]
    if m < 4:
        raise ValueError(f"mmd2_and_variance needs 4 rows or more, not {m}")
    with no_autocast(x):
        x, y = dispatch.wide(x, y)
        if all(k.radial for k in kernel.terms):
            x, y = centred(x, y)
        terms, parameters = stated(kernel.terms, x)
        a, b, p, q, squares = moments(x.contiguous(), y.contiguous(), parameters, terms)
        xx, yy, xy = squares.unbind()
        variance = (
            (2 / (m**2 * (m - 1) ** 2))
            * (2 * _sq(a) - xx + 2 * _sq(b) - yy)
            - ((4 * m - 6) / (m**3 * (m - 1) ** 3)) * (a.sum() ** 2 + b.sum() ** 2)
            + (4 * (m - 2) / (m**3 * (m - 1) ** 2)) * (_sq(p) + _sq(q))
            - (4 * (m - 3) / (m**3 * (m - 1) ** 2)) * xy
            - ((8 * m - 12) / (m**5 * (m - 1))) * p.sum() ** 2
            + (8 / (m**3 * (m - 1)))
            * ((a.sum() + b.sum()) * p.sum() / m - (a * p).sum() - (b * q).sum())
        )  # fmt: skip
        mean = (a.sum() + b.sum()) / (m * (m - 1)) - 2 * p.sum() / m**2
        return mean.to(x.dtype), variance.to(x.dtype)


def _sq(t: Tensor) -> Tensor:
    return t.square().sum()
