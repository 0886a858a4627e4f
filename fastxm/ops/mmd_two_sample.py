"""What surrounds MMD in two-sample testing: its variance, and permutation p-values."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastxm.ops import dispatch
from fastxm.ops.mmd_checks import problem
from fastxm.ops.mmd_kernels import Kernel
from fastxm.ops.mmd_rows import centred

# pairs of rows at a time: glibc gives blocks of more than 32 MiB back at once, where smaller ones
# would leave holes between what autograd keeps of each
BLOCK = 10 << 20


def mmd2_and_variance(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Unbiased MMD^2 and an unbiased estimate of the variance of it, for tests and their power.

    Args:
        x, y: [N, D], N >= 4, any floating dtype. Memory is O(N D), as the kernel's matrix comes in
            blocks of rows, which the backward makes again.
        kernel: see mmd2. For kernels learned by power, maximise mmd2 / sqrt(max(variance, 1e-8)).

    Returns:
        two scalars, float32 (float64 for float64 inputs), differentiable to any order. The
        estimate of the variance may be negative.

    Raises:
        ValueError: N and M differ, or fewer than 4 rows.

    Source: Sutherland et al. 2017 (ICLR), in the sums a = Kxx 1, b = Kyy 1, p = Kxy 1, q = Kxy' 1,
    diagonals of Kxx and Kyy zero.
    """
    problem(x, y, kernel, "u_statistic")
    m = len(x)
    if m < 4:
        raise ValueError(f"mmd2_and_variance needs 4 rows or more, not {m}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = dispatch.wide(x, y)
        if all(k.radial for k in kernel.terms):
            x, y = centred(x, y)
        (a, _, xx), (b, _, yy) = _sums(x, x, kernel), _sums(y, y, kernel)
        p, q, xy = _sums(x, y, kernel)
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


def _sums(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernel's matrix sums of rows and of columns and the sum of squares, float64.

    If y is x, its diagonal counts as 0.
    """

    def block(rows: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        k = kernel.matrix(rows, y)
        if y is x:
            own = torch.zeros_like(k, dtype=torch.bool)
            own.diagonal(i).fill_(True)
            k = k.masked_fill(own, 0)
        k = k.double()
        return k.sum(1), k.sum(0), _sq(k)

    rows: list[Tensor] = []
    columns, squares = y.new_zeros(len(y)).double(), y.new_zeros(()).double()
    n = max(1, BLOCK // len(y))
    for i, some in zip(range(0, len(x), n), x.split(n)):
        of_rows, of_columns, square = checkpoint(block, some, i, use_reentrant=False)
        rows.append(of_rows)
        columns, squares = columns + of_columns, squares + square
    return torch.cat(rows), columns, squares


def mmd_permutation_test(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    permutations: int = 1000,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Unbiased MMD^2 and the share of relabellings of the rows that reach it.

    Args:
        x, y: [N, D] and [M, D], at least 2 rows each, any floating dtype.
        kernel: see mmd2.
        permutations: how many relabellings; all are read off one visit of the kernel matrix, whose
            rows come in blocks: memory is O((N + M) (D + permutations)).
        generator: of the device of x, for the relabellings.

    Returns:
        the statistic and p = (1 + number of permuted >= statistic) / (permutations + 1), float64
        scalars without gradient.
    """
    problem(x, y, kernel, "unbiased")
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more, not {permutations}")
    n, m = len(x), len(y)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = dispatch.wide(x, y)
        z = torch.cat(centred(x, y) if all(k.radial for k in kernel.terms) else (x, y))
        scores = torch.rand(n + m, permutations, generator=generator, device=x.device)
        first = scores.argsort(0) < n  # a random n of the n + m rows, in each column
        observed = torch.arange(n + m, device=x.device)[:, None] < n
        first = torch.cat([observed, first], 1).double()  # [N + M, 1 + permutations]
        statistics, rounding = _relabelled(z, kernel, first, n, m)
        reached = (statistics[1:] >= statistics[0] - rounding).sum()
        return statistics[0], (1 + reached.double()) / (permutations + 1)


def _relabelled(
    z: Tensor, kernel: Kernel, first: Tensor, n: int, m: int, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Unbiased MMD^2 for each column of `first` [N + M, P], and a bound of its rounding."""
    diagonal = kernel.paired(z, z).double()
    rows_of_first = torch.zeros_like(first[0])  # sum over i, j in x of k
    crossing = torch.zeros_like(first[0])  # sum over i in x, j in y of k
    total = first.new_zeros(())
    for i in range(0, len(z), block):
        k = kernel.matrix(z[i : i + block], z).double()
        # a row's distance to itself is exactly 0
        k.diagonal(i).copy_(diagonal[i : i + block])
        sums = k @ first
        rows_of_first += (first[i : i + block] * sums).sum(0)
        crossing += ((1 - first[i : i + block]) * sums).sum(0)
        total += k.sum()
    own = diagonal @ first
    xx = (rows_of_first - own) / (n * (n - 1))
    yy = (total - rows_of_first - 2 * crossing - (diagonal.sum() - own)) / (m * (m - 1))
    # relabellings that only swap x and y tie up to the order of their sums
    rounding = 64 * torch.finfo(torch.float64).eps * (xx.abs() + yy.abs()).max()
    return xx + yy - 2 * crossing / (n * m), rounding
