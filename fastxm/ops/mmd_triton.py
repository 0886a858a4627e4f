"""Tiles of an MMD by Triton: no product is written, only the gradient weights."""

import importlib

import torch
from torch import Tensor

from fastxm.ops.mmd_native import DIAGONALS
from fastxm.ops.mmd_rows import Function, Room, Rows
from fastxm.ops.mmd_tiles import plain, wanted

TILE = 8192
PRECISIONS = {"float32": "ieee", "tf32": "tf32", "tf32x3": "tf32x3", "bfloat16": "ieee"}


def fused(
    f: Function, rows: Rows, columns: Rows, own: str, mirrored: bool, room: Room
) -> Tensor | None:
    """A tile by one kernel; in PyTorch where the kernel's numbers get gradients too."""
    if f.derivatives is not None or any(term.degree > 9 for term in f.terms):
        return plain(f, rows, columns, own, mirrored, room)
    kernels = importlib.import_module("fastxm.kernels.mmd")
    w = room.tile(len(rows.z), len(columns.z))[1] if wanted(rows, columns) else None
    shapes, weights = f.ascending
    kinds = [(term.kind, term.degree) for term in f.terms for _ in range(term.parts)]
    with torch.cuda.device_of(rows.z):
        of_rows, of_columns = kernels.tile(
            *(rows.z, columns.z, rows.norms, columns.norms, rows.weight, columns.weight),
            *(rows.scale, shapes, weights, kinds, f.radial, DIAGONALS.index(own), w),
            PRECISIONS[f.precision],
        )
    rows.potential += of_rows[0]
    rows.slopes += of_rows[1]
    if mirrored:
        columns.potential += of_columns[0]
        columns.slopes += of_columns[1]
    return w
