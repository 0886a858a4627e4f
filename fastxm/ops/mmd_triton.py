"""Tiles of an MMD by Triton: no product is written, only the gradient weights."""

import importlib

import torch
from torch import Tensor

from fastxm.ops.mmd_native import DIAGONALS
from fastxm.ops.mmd_pairs import Term
from fastxm.ops.mmd_rows import Function, Rows
from fastxm.ops.mmd_tiles import Room, plain, wanted

TILE = 8192  # rows: offsets within a tile stay within 32 bits
PRECISIONS = {"float32": "ieee", "tf32": "tf32", "tf32x3": "tf32x3", "bfloat16": "ieee"}


def fused(
    f: Function, rows: Rows, columns: Rows, own: str, mirrored: bool, room: Room
) -> Tensor | None:
    """A tile by one kernel; in PyTorch where the kernel's numbers get gradients too."""
    if f.derivatives is not None or any(term.degree > 9 for term in f.terms):
        return plain(f, rows, columns, own, mirrored, room)
    kernels = importlib.import_module("fastxm.kernels.mmd")
    w = room.weights(len(rows.z), len(columns.z)) if wanted(rows, columns) else None
    shapes, weights = f.ascending
    kinds = [kind for term in f.terms for kind in _parts(term)]
    with torch.cuda.device_of(rows.z):
        of_rows, of_columns = kernels.tile(
            *(rows.z, columns.z, rows.norms, columns.norms, rows.weight, columns.weight),
            *(rows.scale, shapes, weights, kinds, f.radial, DIAGONALS.index(own), not mirrored, w),
            PRECISIONS[f.precision],
        )
    for some, sums in ((rows, of_rows), (columns, of_columns))[: 1 + mirrored]:
        some.potential += sums[0]
        if w is not None:
            some.slopes += sums[1]
    return w


def _parts(term: Term) -> list[tuple[int, int]]:
    # a power of a power would take the rounding of an exponential times 16
    degrees = [term.degree, term.degree] if not term.radial else [1, term.degree]
    return [(term.kind, degrees[q % 2]) for q in range(term.parts)]
