"""MMD^2 of samples that stay where they are, on disk perhaps: a few blocks of rows at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.ops import mmd_backends
from fastxm.ops.mmd_checks import families, stated
from fastxm.ops.mmd_kernels import Kernel
from fastxm.ops.mmd_reference import unpack
from fastxm.ops.mmd_rows import Function, Rows
from fastxm.ops.mmd_tiles import visit


def streamed_mmd2(
    x: Any,
    y: Any,
    kernel: Kernel,
    *,
    unbiased: bool = False,
    block: int = 8192,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """MMD^2 of rows that are read in blocks; no more than two blocks are held at once.

    Args:
        x, y: [N, D] and [M, D]: tensors, arrays or memory maps, which are read by slices of rows.
        kernel: as mmd2 takes it.
        unbiased: leaves pairs of a row with itself out.
        block: rows of a block.
        device: where the blocks are taken.
        dtype: float32 or float64, of the computation.

    Returns:
        a scalar, float64, without gradient.

    Raises:
        ValueError: shapes that do not fit, or too few rows.
    """
    least = 2 if unbiased else 1
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x is [N, D] and y [M, D], not {[*x.shape]} and {[*y.shape]}")
    if min(len(x), len(y)) < least:
        raise ValueError(f"{least} rows or more are needed, not {len(x)} and {len(y)}")

    def read(z: Any, start: int) -> Tensor:
        some = z[start : start + block]
        # a read-only map is copied, as its rows are read
        some = some if isinstance(some, Tensor) else torch.from_numpy(np.array(some))
        return some.to(device, dtype)

    n, m = len(x), len(y)
    with torch.no_grad():
        sums = [read(z, i).double().sum(0) for z in (x, y) for i in range(0, len(z), block)]
        centre = (torch.stack(sums).sum(0) / (n + m)).to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for terms in families(kernel):
            numbers, parameters = stated(terms, centre.new_empty(0, len(centre)))
            function = Function(unpack(numbers), parameters)

            def rows_of(z: Any, start: int, function: Function = function) -> Rows:
                rows = read(z, start)
                rows = (rows - centre if function.radial else rows).contiguous()
                weight = rows.new_ones(len(rows))
                return Rows.make(rows, rows, weight, False, rows.device.type == "cpu")

            xx = _pairs(function, rows_of, x, x, block, unbiased)
            yy = _pairs(function, rows_of, y, y, block, unbiased)
            xy = _pairs(function, rows_of, x, y, block, False)
            total += xx / (n * (n - unbiased)) + yy / (m * (m - unbiased)) - 2 * xy / (n * m)
    return total


def _pairs(
    function: Function,
    rows_of: Callable[[Any, int], Rows],
    x: Any,
    y: Any,
    block: int,
    drop: bool,
) -> Tensor:
    """The sum of the kernel over all pairs of a row of x and one of y, which may be x."""
    found = []
    for i in range(0, len(x), block):
        rows = rows_of(x, i)
        name = mmd_backends.backend(rows.weight, False)
        how = (mmd_backends.MAKERS[name], mmd_backends.TILE[name])
        for j in range(i if x is y else 0, len(y), block):
            own = x is y and j == i
            columns = rows if own else rows_of(y, j)
            given = (rows, columns, rows.weight.new_ones(()), drop and own)
            with mmd_backends.tf32(rows.weight.device, False):
                part = visit(function, *given, *how)[0].double().sum()
            del columns, given  # before the next are read
            found.append(part if own or x is not y else 2 * part)
    return torch.stack(found).sum()
