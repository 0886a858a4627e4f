"""Tiles of an MMD by the CUDA kernels of fastxm._C, over the vendor's products."""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import gemm
from fastxm.ops.mmd_native import numbers_of
from fastxm.ops.mmd_rows import Function, Rows
from fastxm.ops.mmd_tiles import Room, plain, wanted

TILE = 8192  # rows, so that the work of a tile outlasts its launches
PARTS, DEGREE = 64, 255  # of a kernel: what the kernels have room for


def epilogue(
    f: Function, rows: Rows, columns: Rows, own: str, mirrored: bool, room: Room
) -> Tensor | None:
    """A tile by one kernel over its products, and one more for derivatives by parameters."""
    if sum(term.parts for term in f.terms) > PARTS or any(t.degree > DEGREE for t in f.terms):
        return plain(f, rows, columns, own, mirrored, room)
    n, m = len(rows.z), len(columns.z)
    products = room.products(n, m)
    gemm.multiply(rows.z, columns.z.T, products)
    w = room.weights(n, m) if wanted(rows, columns) else None
    wide = products.dtype == torch.float64
    strips, chunks = _C.mmd_parts_cuda(wide, n, m)
    of_rows = products.new_empty(2, strips, n)  # potentials, slopes
    of_columns = products.new_empty(2, chunks, m)
    found = None
    if f.derivatives is not None:
        found = f.derivatives.new_empty(2, sum(t.parts for t in f.terms), strips * chunks)
    tile = numbers_of(rows, columns, own, products, w, (*of_rows, *of_columns), mirrored, found)
    with torch.cuda.device_of(products):
        if f.derivatives is not None and found is not None:
            _C.mmd_derivatives_cuda(f.numbers(f.stacked), tile, gemm.stream(products))
            by = found.sum(2).split([term.parts for term in f.terms], 1)
            f.derivatives.add_(torch.cat([t.flatten() for t in by]), alpha=1 if mirrored else 0.5)
        _C.mmd_tile_cuda(f.numbers(f.ascending), tile, gemm.stream(products))
    rows.potential += of_rows[0].sum(0)
    if mirrored:
        columns.potential += of_columns[0].sum(0)
    if w is not None:
        rows.slopes += of_rows[1].sum(0)
        if mirrored:
            columns.slopes += of_columns[1].sum(0)
    return w
