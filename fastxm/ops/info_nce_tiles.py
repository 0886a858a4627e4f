"""InfoNCE on a CPU by the tile kernels of fastxm._C: one native call forward, and one backward.

Forward: the products of a tile of 24 x 256 logits (32 of bfloat16), and its sums while it is in the
first level of the cache. Backward: gradients of the logits, tile by tile where their products with
x and y take them, from what the forward kept of each tile, exp(s - reference) in the dtype of the
rows; where nothing was kept, they are made once, for the product with x, and those of some rows are
left for that with y. Where there is no such kernel for the dtype, `info_nce_blocks` does it.
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm
from fastxm.ops import info_nce_blocks as blocks
from fastxm.ops.info_nce_rows import finish
from fastxm.ops.info_nce_sums import Forward, candidates

__all__ = ["bwd", "finish", "fwd", "gradients", "rnorms", "sums"]

WORKSPACE = 24 << 20  # bytes that sums of rows, or gradients of logits, may take
COLUMNS, *KEPT = _C.info_nce_kept_cpu()  # of a tile; its rows and bytes, float32 and bfloat16


def fits(x: Tensor, y: Tensor) -> bool:
    """Whether the tile kernels multiply these rows."""
    return bool(gemm.PACKED) and dispatch.wide_dtype(x, y) == torch.float32


def halves(x: Tensor, y: Tensor) -> bool:
    """Whether they multiply them as bfloat16, and not as float32."""
    return x.dtype == y.dtype == torch.bfloat16 and torch.bfloat16 in gemm.PACKED


def kept(x: Tensor, y: Tensor, stored: bool) -> Tensor:
    """A place for what the forward keeps, a row a tile; of no tiles if it keeps nothing."""
    rows, size = KEPT[2:] if halves(x, y) else KEPT[:2]
    tiles = -(-x.shape[0] // rows) * -(-y.shape[0] // COLUMNS) if stored else 0
    return x.new_empty(tiles, size, dtype=torch.uint8)


def sums(x, y, a, b, row_labels, labels, offset, stored, count=4) -> tuple[Tensor, Tensor, Tensor]:
    """As `info_nce_blocks.sums`."""
    if not fits(x, y):
        return blocks.sums(x, y, a, b, row_labels, labels, offset, stored, count)
    row, column, tiles = a.new_empty(6, x.shape[0]), a.new_empty(5, y.shape[0]), kept(x, y, stored)
    problem = _Problem(x, y, a, b, row_labels, labels, offset, tiles)
    problem.run("sums", row.data_ptr(), column.data_ptr())
    return row, column, tiles


def gradients(
    row, column, x, y, a, b, row_labels, labels, offset, smoothing, tiles
) -> tuple[Tensor, Tensor]:
    """As `info_nce_blocks.gradients`."""
    if not fits(x, y):
        given = (x, y, a, b, row_labels, labels, offset, smoothing, tiles)
        return blocks.gradients(row, column, *given)
    problem = _Problem(x, y, a, b, row_labels, labels, offset, tiles)
    row, column = row.contiguous(), None if column is None else column.contiguous()
    terms = (row.data_ptr(), 0 if column is None else column.data_ptr())
    return problem.gradients("sums_bwd", torch.float32, terms, (), smoothing)


def rnorms(x: Tensor, y: Tensor) -> Tensor:
    """As `info_nce_rows.rnorms`."""
    if not fits(x, y):
        return blocks.rnorms(x, y)
    x, y = gemm.operands(x, y)
    (N, depth), M = x.shape, y.shape[0]
    out = x.new_empty(N + M, dtype=torch.float32)
    sizes = (x.dtype == torch.bfloat16, N, M, depth)
    _C.info_nce_rnorms_cpu(sizes, x.data_ptr(), y.data_ptr(), out.data_ptr(), dispatch.threads())
    return out


def fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True) -> Forward:
    if not fits(x, y):
        return blocks.fwd(x, y, a, b, labels, symmetric, smoothing, offset, stored)
    (N, M), tiles = (x.shape[0], y.shape[0]), kept(x, y, stored)
    loss, rows, columns = a.new_empty(N), a.new_empty(3, N), a.new_empty(3, M if symmetric else 0)
    problem = _Problem(x, y, a, b, _own(labels, N, offset), labels, offset, tiles)
    results = (loss.data_ptr(), rows.data_ptr(), columns.data_ptr() if symmetric else 0)
    count = _counts(labels, smoothing, N, M, offset)
    problem.run("losses", results, smoothing, 0 if count is None else count.data_ptr())
    return loss, rows, columns, tiles


def bwd(
    dloss, x, y, a, b, rnorms, labels, row_lse, column_lse, tiles, symmetric, smoothing, offset
) -> tuple[Tensor, Tensor, Tensor]:
    if not fits(x, y):
        options = (tiles, symmetric, smoothing, offset)
        return blocks.bwd(dloss, x, y, a, b, rnorms, labels, row_lse, column_lse, *options)
    N, M = x.shape[0], y.shape[0]
    problem = _Problem(x, y, a, b, _own(labels, N, offset), labels, offset, tiles)
    lses = (row_lse.data_ptr(), column_lse.data_ptr() if symmetric else 0)
    terms = (dloss.data_ptr(), dloss.stride(0), *lses)
    count = _counts(labels, smoothing, N, M, offset)
    along = a.new_empty(N)
    more = (0 if rnorms is None else rnorms.data_ptr(), along.data_ptr())
    address = 0 if count is None else count.data_ptr()
    dx, dy = problem.gradients("losses_bwd", problem.x.dtype, terms, more, smoothing, address)
    return dx.to(x.dtype).contiguous(), dy.to(y.dtype).contiguous(), along


def _own(labels: Tensor | None, N: int, offset: int) -> Tensor | None:
    return None if labels is None else labels[offset : offset + N]


def _counts(labels, smoothing, N, M, offset) -> Tensor | None:
    """How many columns each row chooses from, where that is needed and differs from row to row."""
    if labels is None or not smoothing:
        return None
    count = candidates(labels, N, M, offset)
    assert isinstance(count, Tensor)
    return count.float()


class _Problem:
    """What every call takes: sizes, and addresses of tensors that live as long as this."""

    def __init__(self, x, y, a, b, row_labels, labels, offset, tiles) -> None:
        self.features = x.shape[1]
        self.x, self.y = gemm.operands(x, y)
        half = self.x.dtype == torch.bfloat16
        self.factors = a.float().contiguous(), b.float().contiguous()
        wide = (
            None if which is None else which.long().contiguous() for which in (row_labels, labels)
        )
        self.tensors = (self.x, self.y, *self.factors, *wide, tiles if tiles.shape[0] else None)
        sizes = (half, x.shape[0], y.shape[0], self.x.shape[1], offset)
        self.given = sizes, tuple(0 if t is None else t.data_ptr() for t in self.tensors)

    def run(self, part: str, *arguments) -> None:
        native = getattr(_C, f"info_nce_{part}_cpu")
        native(*self.given, *arguments, WORKSPACE, dispatch.threads())

    def gradients(
        self, part: str, dtype: torch.dtype, terms: tuple, more: tuple, *options
    ) -> tuple[Tensor, Tensor]:
        dx, dy = (torch.empty_like(t, dtype=dtype) for t in (self.x, self.y))
        self.run(part, *terms, (dx.data_ptr(), dy.data_ptr(), *more), *options)
        return dx[:, : self.features], dy[:, : self.features]
