"""InfoNCE by blocks of rows, in O((N + M) D) memory: products, and one native pass over them.

The vendor's matrix product makes a block of logits: on a GPU, and on a CPU where `info_nce_tiles`
has no tile kernel for the dtype. The backward writes the gradient of
a block of logits, which two vendor products take on to x and y: in x's dtype, but in float32 for
float16, in which the share of one pair in thousands would be 0.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm
from fastxm.ops.gemm import stream
from fastxm.ops.info_nce_rows import finish, rnorms
from fastxm.ops.info_nce_sums import backward, forward, new_sums

__all__ = ["bwd", "finish", "fwd", "gradients", "rnorms", "sums"]

BLOCK = 16 << 20  # bytes of a block
LAUNCH = 8  # on a GPU as many of them, so that its work outlasts a launch


class _Logits:
    """s[i, j] = a[i] b[j] <x[i], y[j]>, some rows at a time."""

    def __init__(self, x, y, a, b, row_labels, labels, offset):
        self.x, self.y = gemm.operands(x, y)
        self.half = self.x.dtype == torch.bfloat16
        self.wide = torch.promote_types(self.x.dtype, torch.float32)
        self.a, self.b = (f.to(self.wide).contiguous() for f in (a, b))
        self.row_labels, self.labels = (
            None if which is None else which.long().contiguous() for which in (row_labels, labels)
        )
        self.offset = offset

    def blocks(self, width: int) -> list[slice]:
        """Rows, of which a block with `width` bytes a row has about BLOCK bytes."""
        n = max(16, BLOCK * (LAUNCH if self.x.is_cuda else 1) // max(1, width))
        return [slice(i, min(i + n, len(self.x))) for i in range(0, len(self.x), n)]

    def room(self, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
        """Blocks of rows, and a place for what any of them makes of all columns."""
        blocks = self.blocks(len(self.y) * dtype.itemsize)
        rows = max((here.stop - here.start for here in blocks), default=0)
        return blocks, self.x.new_empty(rows, len(self.y), dtype=dtype)

    def tiles(self, here: slice, products: Tensor, *, ready: bool = False) -> tuple:
        """The arguments that say where the logits of these rows come from.

        products: [n, M], where they are if `ready`, else to be written.
        """
        if not ready:
            gemm.multiply(self.x[here], self.y.T, products)
        a, row_labels = self.a[here], None if self.row_labels is None else self.row_labels[here]
        sizes = (self.wide == torch.float64, len(a), len(self.y), self.offset + here.start)
        tensors = (products, a, self.b, row_labels, self.labels)
        return sizes, tuple(0 if t is None else t.data_ptr() for t in tensors)

    def run(self, part: str, tiles: tuple, *arguments: Any) -> None:
        """What fastxm._C does to a block of logits: part is "fwd" or "bwd"."""
        queue = stream(self.x)
        if queue is None:
            getattr(_C, f"info_nce_{part}_cpu")(*tiles, *arguments, dispatch.threads())
            return
        if part == "fwd":
            _, rows, columns, *_ = tiles[0]
            workspace = self.a.new_empty(_C.info_nce_workspace_cuda(rows, columns))
            arguments = (*arguments, workspace.data_ptr())
        with torch.cuda.device_of(self.x):
            getattr(_C, f"info_nce_{part}_cuda")(*tiles, *arguments, queue)


def sums(x, y, a, b, row_labels, labels, offset, stored, count=4) -> tuple[Tensor, Tensor, Tensor]:
    """Of any rows x and y: sums of rows [5, N] and below them their positives [6, N], sums of
    columns [5, M] (see info_nce_sums), and the products [N, M], or [0, M] if not stored.

    row_labels [N] and labels [M], or None. offset: the column of row 0's positive; a row whose
    column lies beyond y has none, and what stands for it is undefined. count: how many sums the
    caller needs, 2 without those of e s and the maxima; here all come at one price.
    """
    logits = _Logits(x, y, a, b, row_labels, labels, offset)
    N, M = len(x), len(y)
    new = logits.a.new_empty
    row, column, kept = new(6, N), new(5, M), new(N if stored else 0, M)
    row[:5], column[:] = new_sums(row), new_sums(column)
    if stored:
        blocks, room = logits.blocks(8 + M // 13), kept  # bytes that the sums of a row take
    else:
        blocks, room = logits.room(logits.wide)
    for here in blocks:
        products = kept[here] if stored else room[: here.stop - here.start]
        tiles = logits.tiles(here, products)
        logits.run("fwd", tiles, row[:, here].data_ptr(), N, column.data_ptr())
    return row, column, kept


def gradients(
    row, column, x, y, a, b, row_labels, labels, offset, smoothing, kept
) -> tuple[Tensor, Tensor]:
    """dx = g y and dy = gᵀ x of any rows x and y, as `sums` takes them, not rounded yet.

    row [3, N], column [3, M] or None: `terms`. kept: products that `sums` stored, or none.
    """
    logits = _Logits(x, y, a, b, row_labels, labels, offset)
    N, ready = len(x), len(kept) > 0
    # what the gradients are products of
    of_x, of_y = (
        t.to(logits.wide) if t.dtype == torch.float16 else t for t in (logits.x, logits.y)
    )
    dx = of_x.new_empty(of_x.shape, dtype=logits.wide)
    dy = of_y.new_zeros(of_y.shape, dtype=logits.wide)
    blocks, room = logits.room(of_x.dtype)
    products = kept
    if not ready:
        products = room if of_x.dtype == logits.wide else torch.empty_like(room, dtype=logits.wide)
    for here in blocks:
        ds = room[: here.stop - here.start]
        logits.run(
            *(
                "bwd",
                logits.tiles(here, products[here] if ready else products[: len(ds)], ready=ready),
            ),
            *(row[:, here].data_ptr(), N, 0 if column is None else column.data_ptr()),
            *(smoothing, logits.half, ds.data_ptr()),
        )
        gemm.multiply(ds, of_y, dx[here])
        gemm.accumulate(dy, ds.T, of_x[here])
    D = x.shape[1]
    return dx[:, :D], dy[:, :D]


fwd, bwd = partial(forward, sums), partial(backward, gradients, finish)
