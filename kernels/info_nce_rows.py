"""What InfoNCE makes of rows one by one: their factors, and gradients through those. Formula and
letters: fastxm/ops/info_nce_rows.py. A program owns some rows.
"""

import triton
import triton.language as tl
from torch import Tensor

LONGEST = tl.constexpr(999_999.0)  # a longer 1 / |x| is of a row that is taken for a longer
ROWS, WIDTH = 4, 1024  # rows of a program, and most features that it takes at a time


@triton.jit
def _rnorms_kernel(x, rnorms, N, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        here = (i < N)[:, None] & (d < D)[None, :]
        at = tl.cast(i, tl.int64)[:, None] * D + d[None, :]
        row = tl.load(x + at, here, other=0.0).to(tl.float32)
        square += tl.sum(row * row, 1)
    tl.store(rnorms + i, 1 / tl.sqrt(tl.maximum(square, 1e-12)), i < N)


@triton.jit
def _finish_kernel(x, dx, rnorms, out, along, N, D, stride, DIRECTIONS: tl.constexpr,
                   ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = tl.cast(i, tl.int64)[:, None]
    inner = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        here = (i < N)[:, None] & (d < D)[None, :]
        row = tl.load(x + wide * D + d[None, :], here, other=0.0).to(tl.float32)
        inner += tl.sum(row * tl.load(dx + wide * stride + d[None, :], here, other=0.0), 1)
    tl.store(along + i, inner, i < N)
    if DIRECTIONS:
        rnorm = tl.load(rnorms + i, i < N, other=0.0)
        share = tl.where(rnorm > LONGEST, 0.0, inner * rnorm * rnorm)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        here = (i < N)[:, None] & (d < D)[None, :]
        grad = tl.load(dx + wide * stride + d[None, :], here, other=0.0)
        if DIRECTIONS:
            row = tl.load(x + wide * D + d[None, :], here, other=0.0).to(tl.float32)
            grad -= share[:, None] * row
        tl.store(out + wide * D + d[None, :], grad.to(out.dtype.element_ty), here)


def _grid(N: int, D: int) -> tuple[tuple[int], int]:
    return (triton.cdiv(N, ROWS),), min(WIDTH, triton.next_power_of_2(max(16, D)))


def rnorms(x: Tensor, out: Tensor) -> None:
    """Writes what makes the rows of x [N, D] unit rows: out [N] of float32."""
    N, D = x.shape
    grid, width = _grid(N, D)
    if N:
        _rnorms_kernel[grid](x, out, N, D, ROWS, width)


def finish(x: Tensor, dx: Tensor, rnorm: Tensor | None, out: Tensor, along: Tensor) -> None:
    """Writes the gradient of rows x [N, D] to out, of their dtype, and along [N].

    dx: [N, D] of float32, whose rows lie anyhow apart. rnorm: [N] where directions count.
    """
    N, D = x.shape
    grid, width = _grid(N, D)
    if N:
        directions = rnorm is not None
        _finish_kernel[grid](x, dx, rnorm, out, along, N, D, dx.stride(0), directions, ROWS, width)


def _compiles(dtype: str, directions: bool) -> list[tuple]:
    sizes = {"N": "i32", "D": "i32:16"}
    rows = {"x": f"*{dtype}:16", **sizes}
    more = {"dx": "*fp32:16", "rnorms": "*fp32:16", "out": f"*{dtype}:16", "along": "*fp32:16"}
    block, options = {"ROWS": ROWS, "WIDTH": 512}, {"num_warps": 4}
    return [
        (_rnorms_kernel, {**rows, "rnorms": "*fp32:16"}, block, options),
        (_finish_kernel, {**rows, **more, "stride": "i32:16"},
         {"DIRECTIONS": directions, **block}, options),
    ]  # fmt: skip


COMPILES = [*_compiles("bf16", True), *_compiles("fp32", False)]
