"""Permutation p-values of MMD."""

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.mmd_backends import tf32
from fastxm.ops.mmd_checks import problem
from fastxm.ops.mmd_kernels import Kernel
from fastxm.ops.mmd_rows import centred


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
    problem(x, y, kernel, "unbiased", one=True)
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more, not {permutations}")
    n, m = len(x), len(y)
    with torch.no_grad(), no_autocast(x):
        x, y = dispatch.wide(x, y)
        rows = {False: torch.cat([x, y]), True: torch.cat(centred(x, y))}
        scores = torch.rand(n + m, permutations, generator=generator, device=x.device)
        first = scores.argsort(0) < n  # a random n of the n + m rows, in each column
        observed = torch.arange(n + m, device=x.device)[:, None] < n
        first = torch.cat([observed, first], 1).double()  # [N + M, 1 + permutations]
        each = [(term, rows[term.radial]) for term in kernel.terms]
        with tf32(x.device, False):
            statistics, rounding = _relabelled(each, first, n, m)
        reached = (statistics[1:] >= statistics[0] - rounding).sum()
        return statistics[0], (1 + reached.double()) / (permutations + 1)


def _relabelled(
    each: list[tuple[Kernel, Tensor]], first: Tensor, n: int, m: int, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Unbiased MMD^2 for each column of `first` [N + M, P], and a bound of its rounding.

    each: the terms of the kernel, and of each the rows [N + M, D].
    """
    diagonal = torch.stack([term.paired(z, z) for term, z in each]).sum(0).double()
    rows_of_first = torch.zeros_like(first[0])  # sum over i, j in x of k
    crossing = torch.zeros_like(first[0])  # sum over i in x, j in y of k
    total = first.new_zeros(())
    for i in range(0, n + m, block):
        k = torch.stack([term.matrix(z[i : i + block], z) for term, z in each]).sum(0).double()
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
