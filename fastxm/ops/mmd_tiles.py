"""Kernel sums and all their gradients in one visit of square tiles, in O((N + M) D) memory.

A tile of inner products becomes gradient weights w, and what its rows and columns need is added up:

    x potential[i] += sum_j b[j] k[i, j]        w[i, j] = scale[i] b[j] slope[i, j]
    y potential[j] += sum_i a[i] k[i, j]        dx[i] += sum_j w[i, j] (y[j] - x[i]),  dy alike

(the differences only for radial kernels, else y[j] and x[i]). Tiles of x with itself are visited
once for (i, j) and (j, i). Precision: see docs/mmd.md.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm
from fastxm.ops.mmd_native import numbers_of, whole
from fastxm.ops.mmd_pairs import by_parameters, off_diagonal, slope, value
from fastxm.ops.mmd_rows import Function, Rows


class Room:
    """Places for the products and for the weights of any tile, made when first asked for."""

    def __init__(self, x: Rows, y: Rows, tile: int):
        self.size, self.like = min(tile, len(x.z)) * min(tile, len(y.z)), x

    def products(self, n: int, m: int) -> Tensor:
        return self._wide[: n * m].view(n, m)

    def weights(self, n: int, m: int) -> Tensor:
        # weights of halves are halves, and the products of float32 are done with
        wide = self.like.other.dtype == self.like.weight.dtype
        return (self._wide if wide else self._half)[: n * m].view(n, m)

    @cached_property
    def _wide(self) -> Tensor:
        return self.like.weight.new_empty(self.size)

    @cached_property
    def _half(self) -> Tensor:
        return self.like.other.new_empty(self.size)


# of a function, rows, columns, what pairs i = j are, whether columns get their sums too, and a
# place for weights: w [n, m], or None where no gradient is wanted
Maker = Callable[[Function, Rows, Rows, str, bool, Room], Tensor | None]


def visit(
    function: Function,
    x: Rows,
    y: Rows,
    coefficient: Tensor | float,
    drop: bool,
    make: Maker,
    tile: int,
    of_y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tiles of x against y, or the upper triangle of x against itself if y is x.

    Args:
        function: the kernel.
        x, y: N and M rows, whose slopes and gradients are added to.
        coefficient: scalar, a factor of w; or [N], where w has a square (see Function).
        drop: leaves the pairs i = j out.
        make: what makes a tile.
        tile: rows of a tile.
        of_y: [M], as coefficient [N].

    Returns:
        potentials of x [N] and of y [M], float64.
    """
    triangle = x is y
    x = x.begin(coefficient)
    y = x if triangle else y.begin(coefficient if of_y is None else of_y)
    N, M = len(x.z), len(y.z)
    if y.panels is not None:
        whole(function, x, y, "dropped" if drop else "same" if triangle else "plain")
        return x.potential, y.potential
    room = Room(x, y, tile)
    for i in range(0, N, tile):
        rows = x.part(i, tile)
        for j in range(i if triangle else 0, M, tile):
            columns = y.part(j, tile)
            own = "dropped" if drop else "same" if triangle else "plain"
            mirrored = not triangle or i != j
            w = make(function, rows, columns, own if i == j else "plain", mirrored, room)
            if w is None:
                continue
            if rows.gradient is not None:
                gemm.accumulate(rows.gradient, w, columns.other)
            if columns.gradient is not None and mirrored:
                gemm.accumulate(columns.gradient, w.T, rows.other)
    return x.potential, y.potential


def wanted(rows: Rows, columns: Rows) -> bool:
    return rows.gradient is not None or columns.gradient is not None


def native(
    f: Function, rows: Rows, columns: Rows, own: str, mirrored: bool, room: Room
) -> Tensor | None:
    """A tile by C++, which makes the products too where it has a kernel for them."""
    n, m = len(rows.z), len(columns.z)
    products = room.products(n, m)
    torch.mm(rows.z, columns.z.T, out=products)
    w = room.weights(n, m) if wanted(rows, columns) else None
    sums = (rows.potential, rows.slopes, columns.potential, columns.slopes)
    squared = (None if f.square is None else columns.scale, f.square, f.squares)
    numbers = numbers_of(rows, columns, own, products, w, sums, mirrored, f.derivatives, squared)
    _C.mmd_tile_cpu(f.numbers(f.parameters), numbers, dispatch.threads())
    return w


def plain(
    f: Function, rows: Rows, columns: Rows, own: str, mirrored: bool, room: Room
) -> Tensor | None:
    """A tile in PyTorch, on any device."""
    n, m = len(rows.z), len(columns.z)
    products = room.products(n, m)
    gemm.multiply(rows.z, columns.z.T, products)
    s = products
    if f.radial:
        s = (rows.norms[:, None] + columns.norms - 2 * products).clamp_min(0)
        s = s if own == "plain" else s * off_diagonal(s)
    keep = off_diagonal(s) if own == "dropped" else 1
    # rows as given and as multiplied differ: a row's slope to itself would pull it between them
    differ = off_diagonal(s) if f.radial and own == "same" else keep
    k = value(f.terms, s, f.parameters) * keep
    rows.potential += k @ columns.weight
    if mirrored:
        columns.potential += rows.weight @ k
    if f.derivatives is not None:
        left = rows.scale if mirrored else rows.scale / 2
        found = by_parameters(f.terms, s, f.parameters)
        f.derivatives += torch.stack([left @ (d * keep) @ columns.weight for d in found])
    if not wanted(rows, columns):
        return None
    w = rows.scale[:, None] * columns.weight * (slope(f.terms, s, f.parameters) * differ)
    weights = room.weights(n, m).copy_(w)
    rows.slopes += weights.sum(1, dtype=rows.slopes.dtype)
    if mirrored:
        columns.slopes += weights.sum(0, dtype=rows.slopes.dtype)
    return weights
