"""Kernel sums in plain PyTorch: the formula of mmd_sums, and that of the kernel <x, y>."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastxm.ops.mmd_pairs import Term, distances, off_diagonal, value
from fastxm.ops.mmd_problems import per_problem, ranges


class Options(NamedTuple):
    """terms: the kernel (`Term`), three numbers each, all radial or none.
    drop_self: leaves pairs of a row with itself out of the first two sums.
    drop_paired: leaves the pairs i = j out of the third.
    precision: of the products, "float64" | "float32" | "bfloat16" | "tf32" | "tf32x3".
    """

    terms: list[int]
    drop_self: bool
    drop_paired: bool
    precision: str


def kernel_sums(starts, options: Options, x, y, a, b, c, parameters) -> Tensor:
    """S of each problem, differentiable to any order, in O(N M) memory."""
    terms = unpack(options.terms)

    def total(x: Tensor, y: Tensor, a: Tensor, b: Tensor, same: bool, drop: bool) -> Tensor:
        s = distances(x, y, same) if terms[0].radial else x @ y.mT
        k = value(terms, s, parameters)
        return a @ (k * off_diagonal(k) if drop else k) @ b

    def one(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        x, y = x.to(a), y.to(b)
        if terms[0].radial:
            centre = (x.detach().sum(0) + y.detach().sum(0)) / (len(x) + len(y))
            x, y = x - centre, y - centre
        sums = (total(x, x, a, a, True, options.drop_self),
                total(y, y, b, b, True, options.drop_self),
                total(x, y, a, b, False, options.drop_paired))  # fmt: skip
        return (c * torch.stack(sums)).sum().to(a.dtype)

    places = zip(ranges(starts[0], len(x)), ranges(starts[1], len(y)), c)
    return torch.stack([one(x[i], y[j], a[i], b[j], own) for i, j, own in places])


def linear_sums(x, y, a, b, c, x_starts, y_starts, drop_self: bool, drop_paired: bool) -> Tensor:
    """S of the kernel <x, y>: products of sums, in O(N D); in float64, for away from the origin
    they cancel."""
    u, v = a.double()[:, None] * x, b.double()[:, None] * y
    p, q = per_problem(u, x_starts), per_problem(v, y_starts)  # [G, D]
    sums = [p.square().sum(1), q.square().sum(1), (p * q).sum(1)]
    if drop_self:
        sums[0] = sums[0] - per_problem(u.square().sum(1), x_starts)
        sums[1] = sums[1] - per_problem(v.square().sum(1), y_starts)
    if drop_paired:
        sums[2] = sums[2] - per_problem((u * v).sum(1), x_starts)
    return (c * torch.stack(sums, 1)).sum(1).to(a.dtype)


def unpack(terms: list[int]) -> list[Term]:
    return [Term(*terms[i : i + 3]) for i in range(0, len(terms), 3)]
