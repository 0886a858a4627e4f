"""What the native code of tiles takes, and where it has products of its own all tiles by C++."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm
from fastxm.ops.mmd_rows import Function, Rows

DIAGONALS = ("plain", "same", "dropped")


def at_once(
    f: Function,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    drop: Sequence[bool],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One problem by one native call; arguments and results as of mmd_sums._fwd, a is float32."""
    half = f.precision == "bfloat16" and torch.bfloat16 in gemm.PACKED
    given = half and x.dtype == y.dtype == torch.bfloat16
    x, y = (z if given else z.float() for z in (x, y))
    x, y, c = x.contiguous(), y.contiguous(), c.contiguous()
    dx, dy = (torch.zeros_like(z, dtype=a.dtype) if w else None for z, w in zip((x, y), wanted))
    of_a, of_b, sums, total = (torch.empty_like(t) for t in (a, b, c, a[:1]))
    derivatives = c.new_zeros(1, len(f.parameters))
    tensors = (x, y, a, b, c, total, dx, dy, of_a, of_b, sums, derivatives if wanted[2] else None)
    numbers = [len(x), len(y), x.shape[1], given, half, *drop]
    numbers += [0 if t is None else t.data_ptr() for t in tensors]
    _C.mmd_samples_cpu(f.numbers(f.parameters), numbers, dispatch.threads())
    dx, dy = (a.new_empty(0) if dz is None else dz for dz in (dx, dy))
    return total, dx, dy, of_a, of_b, sums, derivatives


def whole(f: Function, x: Rows, y: Rows, own: str) -> None:
    """All of x and y by C++, in blocks: their products, the kernel, the gradients' products."""
    numbers = numbers_of(
        x,
        y,
        own,
        products=None,
        weights=None,
        sums=(x.potential, x.slopes, y.potential, y.slopes),
        mirrored=True,
        derivatives=f.derivatives,
        squared=(None if f.square is None else y.scale, f.square, f.squares),
        given=(x.other, y.other, x.gradient, y.gradient),
    )
    _C.mmd_tile_cpu(f.numbers(f.parameters), numbers, dispatch.threads())


def numbers_of(
    rows: Rows,
    columns: Rows,
    own: str,
    products: Tensor | None,
    weights: Tensor | None,
    sums: tuple[Tensor, ...],
    mirrored: bool,
    derivatives: Tensor | None,
    squared: tuple[Tensor | None, ...] = (None, None, None),
    given: tuple[Tensor | None, ...] = (None,) * 4,
) -> list[int]:
    """MmdTile of csrc/cpu/mmd.h; sums: potentials and slopes of rows, then those of columns;
    squared: y_scales, square and squares."""
    x_potential, x_slopes, *of_columns = sums
    y_potential, y_slopes = of_columns if mirrored else (None, None)
    tensors = [
        *(rows.z, columns.panels, products, weights, rows.norms, columns.norms),
        *(rows.weight, columns.weight, rows.scale, x_potential, y_potential, x_slopes, y_slopes),
        derivatives,
        *squared,
        *given,
    ]
    half = rows.z.dtype == torch.bfloat16
    gradient = columns.gradient if rows.gradient is None else rows.gradient
    features = 0 if gradient is None else gradient.shape[1]
    numbers = [len(rows.z), len(columns.z), DIAGONALS.index(own), half, rows.z.shape[1], features]
    return numbers + [0 if t is None else t.data_ptr() for t in tensors]
