"""Kernel sums and all their gradients in one visit of square tiles, in O(N D) memory.

A tile of inner products is made by the vendor's GEMM. One epilogue, C++ or plain PyTorch, turns it
into gradient weights w in place and adds up what its rows and columns need:

    x potential[i] += sum_j b[j] k[i, j]        w[i, j] = scale[i] b[j] slope[i, j]
    y potential[j] += sum_i a[i] k[i, j]        dx[i] += sum_j w[i, j] (y[j] - x[i]),  dy alike

(the differences only for radial kernels, else y[j] and x[i]). Tiles of x with itself are visited
once for (i, j) and (j, i).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch
from fastxm.ops.mmd_pairs import by_parameters, off_diagonal, slope, value

KINDS = ("rbf", "rational_quadratic", "laplace", "energy", "polynomial")
DIAGONALS = ("plain", "same", "dropped")


@dataclass
class Function:
    """The kernel, as mmd_pairs states it."""

    kind: str
    degree: int
    parameters: Tensor  # [2, K]
    dparameters: Tensor | None  # [2, K], added to if given


@dataclass
class Rows:
    """One sample, or a range of its rows, and what a visit adds to it."""

    z: Tensor  # [N, D]
    norms: Tensor  # [N], squared
    weight: Tensor  # [N]
    scale: Tensor  # [N], weight times the coefficient of the visit
    potential: Tensor  # [N]
    slopes: Tensor  # [N], sums of w
    gradient: Tensor | None  # [N, D], if wanted

    @classmethod
    def make(cls, z: Tensor, weight: Tensor, gradient: bool) -> "Rows":
        zeros = torch.zeros_like(weight)
        dz = torch.zeros_like(z) if gradient else None
        return cls(z, z.square().sum(1), weight, weight, zeros, torch.zeros_like(weight), dz)

    def begin(self, coefficient: Tensor) -> "Rows":
        scale, potential = coefficient * self.weight, torch.zeros_like(self.weight)
        return replace(self, scale=scale, potential=potential)

    def part(self, start: int, size: int) -> "Rows":
        some = slice(start, start + size)
        gradient = None if self.gradient is None else self.gradient[some]
        return Rows(self.z[some], self.norms[some], self.weight[some], self.scale[some],
                    self.potential[some], self.slopes[some], gradient)  # fmt: skip


Epilogue = Callable[[Function, Tensor, Rows, Rows, str, bool], None]


def visit(
    function: Function,
    x: Rows,
    y: Rows,
    coefficient: Tensor,
    drop: bool,
    epilogue: Epilogue,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """All tiles of x against y, or the upper triangle of x against itself if y is x.

    Args:
        function: the kernel.
        x, y: N and M rows, whose slopes and gradients are added to.
        coefficient: scalar, a factor of w.
        drop: leaves the pairs i = j out.
        epilogue: `native` or `plain`.
        tile: rows of a tile.

    Returns:
        potentials of x [N] and of y [M].
    """
    triangle = x is y
    x, y = x.begin(coefficient), y.begin(coefficient)
    y = x if triangle else y
    N, M = len(x.z), len(y.z)
    buffer = x.z.new_empty(min(tile, N) * min(tile, M))
    for i in range(0, N, tile):
        rows = x.part(i, tile)
        for j in range(i if triangle else 0, M, tile):
            columns = y.part(j, tile)
            n, m = len(rows.z), len(columns.z)
            products = torch.mm(rows.z, columns.z.T, out=buffer[: n * m].view(n, m))
            own = "dropped" if drop else "same" if triangle else "plain"
            mirrored = not triangle or i != j
            epilogue(function, products, rows, columns, own if i == j else "plain", mirrored)
            if rows.gradient is not None:
                rows.gradient.addmm_(products, columns.z)
            if columns.gradient is not None and mirrored:
                columns.gradient.addmm_(products.T, rows.z)
    return x.potential, y.potential


def wanted(rows: Rows, columns: Rows) -> bool:
    return rows.gradient is not None or columns.gradient is not None


def native(f: Function, products, rows: Rows, columns: Rows, own: str, mirrored: bool) -> None:
    """The C++ epilogue; `own`: what pairs i = j are; `mirrored`: columns get their sums too."""
    sizes = [KINDS.index(f.kind), f.degree, products.dtype == torch.float64, *products.shape,
             f.parameters.shape[1], DIAGONALS.index(own), wanted(rows, columns)]  # fmt: skip
    tensors = [products, rows.norms, columns.norms, rows.weight, rows.scale, columns.weight,
               f.parameters, rows.potential, columns.potential, rows.slopes,
               columns.slopes]  # fmt: skip
    addresses = [t.data_ptr() for t in tensors]
    if not mirrored:
        addresses[8] = addresses[10] = 0
    _C.mmd_cpu(sizes, addresses, dispatch.threads())


def plain(f: Function, products, rows: Rows, columns: Rows, own: str, mirrored: bool) -> None:
    """The epilogue in PyTorch, on any device, with the derivatives by the kernel's parameters."""
    s = products
    if f.kind != "polynomial":
        s = (rows.norms[:, None] + columns.norms - 2 * products).clamp_min(0)
        s = s if own == "plain" else s * off_diagonal(s)
    at = (f.kind, s, f.parameters, f.degree)
    keep = off_diagonal(s) if own == "dropped" else 1
    k = value(*at) * keep
    rows.potential += k @ columns.weight
    if mirrored:
        columns.potential += rows.weight @ k
    if f.dparameters is not None:
        left = rows.scale if mirrored else rows.scale / 2
        found = [[left @ (d * keep) @ columns.weight for d in row] for row in by_parameters(*at)]
        f.dparameters += torch.stack([torch.stack(row) for row in found])
    if wanted(rows, columns):
        products.copy_(rows.scale[:, None] * columns.weight * (slope(*at) * keep))
        rows.slopes += products.sum(1)
        if mirrored:
            columns.slopes += products.sum(0)
