"""MMD^2 of a kernel that may be a sum, as weighted means over pairs, of one process or of ranks."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import mmd_ranks
from fastxm.ops.mmd_checks import Problem, families, stated
from fastxm.ops.mmd_kernels import Kernel
from fastxm.ops.mmd_problems import per_problem
from fastxm.ops.mmd_reference import Options, linear_sums
from fastxm.ops.mmd_sums import kernel_sums


def sums_of(
    p: Problem,
    kernel: Kernel,
    c: Tensor,
    drop: tuple[bool, bool],
    precision: str,
    ranks: mmd_ranks.Ranks | None = None,
) -> Tensor:
    """[G], the three sums of each problem with the coefficients c [G, 3]."""
    sums = []
    starts, like = (p.x_starts, p.y_starts), p.a.new_empty(0, p.x.shape[1])
    for terms in families(kernel):
        if terms[0].kind == "linear":
            weight = torch.stack([k.parameters(like)[0, 0] for k in terms]).sum()
            if ranks is None:
                linear = linear_sums(p.x, p.y, p.a, p.b, c, *starts, *drop)
            else:
                linear = mmd_ranks.linear_sums(p.x, p.y, p.a, p.b, c, *drop, ranks)
            sums.append(weight * linear)
            continue
        given, parameters = stated(terms, like)
        options = Options(given, *drop, precision)
        rows = (p.x, p.y, p.a, p.b, c, parameters)
        if ranks is None:
            sums.append(kernel_sums(*rows, *starts, options))
        else:
            sums.append(mmd_ranks.kernel_sums(*rows, options, ranks))
    return functools.reduce(torch.add, sums)


def coefficients(
    a,
    b,
    x_starts,
    y_starts,
    drop_self: bool,
    drop_paired: bool,
    ranks: mmd_ranks.Ranks | None = None,
) -> Tensor:
    """[G, 3], one over the sum of the weights of the pairs in each of the three means; the last
    times -2."""

    def total(rows, starts):  # the Dynamo of PyTorch 2.9 cannot trace `Tensor | None` in here
        found = per_problem(rows, starts)
        return found if ranks is None else ranks.total(found)

    of_x, of_y = total(a, x_starts), total(b, y_starts)
    xx, yy, xy = of_x.square(), of_y.square(), of_x * of_y
    if drop_self:
        xx = xx - total(a.square(), x_starts)
        yy = yy - total(b.square(), y_starts)
    if drop_paired:
        xy = xy - total(a * b, x_starts)
    return torch.stack([xx, yy, xy / -2], 1).reciprocal()


@torch.compiler.disable
def of_ranks(
    p: Problem, kernel: Kernel, drop: tuple[bool, bool], precision: str, group: dist.ProcessGroup
) -> Tensor:
    """MMD^2 of the rows of all ranks, on each."""
    ranks = mmd_ranks.Ranks.of(p.x, p.y, group)
    least = 2 if drop[0] else 1
    if min(sum(ranks.x_counts), sum(ranks.y_counts)) < least:
        raise ValueError(f"the ranks need {least} rows or more together")
    c = coefficients(p.a.double(), p.b.double(), None, None, *drop, ranks)
    return sums_of(p, kernel, c, drop, precision, ranks)[0]
