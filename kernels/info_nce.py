"""The sums over InfoNCE's logits, in registers, where a matrix product begins. Formula and letters:
fastxm/ops/info_nce.py.

A program owns a strip of rows and a part of the columns. Of the logits s in it, it gives for each
row and each column a reference, the sum of e = exp(s - reference) and, where they are asked for,
the sums of e s and of s; the reference is then their maximum. Where they are not, a whole tile
without a positive takes one exponential a pair, with one reference for all its rows and columns; if
a row or a column turns out too far below or above it, the tile is taken again, apart.

A tile of products is taken to its end in pieces of few columns, lest it needs its registers twice.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .gemm import row_products
from .info_nce_tiles import (
    CANDIDATES,
    CONFIGS,
    PART,
    TALLEST,
    architecture,
    compiles,
    one_reference,
    size_class,
    tuned,
)

NOTHING = tl.constexpr(-1e30)  # the logit of a pair that is left out: below every other
BITS = tl.constexpr(math.log2(math.e))


@triton.jit
def _half(products, right: tl.constexpr):
    N: tl.constexpr = products.shape[0]
    M: tl.constexpr = products.shape[1]
    low, high = tl.split(products.reshape(N, 2, M // 2).permute(0, 2, 1))
    return high if right else low


@triton.jit
def _piece(products, k: tl.constexpr, HALVINGS: tl.constexpr):
    # piece k of the 2 ** HALVINGS, side by side, of products
    for level in tl.static_range(HALVINGS):
        products = _half(products, k >> (HALVINGS - 1 - level) & 1)
    return products


@triton.jit
def _exp(s):
    # tl.exp takes four instructions for numbers that float32 cannot hold in full
    return tl.exp2(s * BITS)


@triton.jit
def _reach(x):
    # how far apart, as a ratio, what one exponential serves may be: further, and its argument's
    # rounding would count beside that of the products
    half: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    return 2.0**60 if half else 2.0**12


@triton.jit
def _crosses(i0, j0, offset, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    # whether a positive is among HEIGHT rows from i0 and WIDTH columns from j0
    return (j0 < i0 + offset + HEIGHT) & (i0 + offset < j0 + WIDTH)


@triton.jit
def _kept(row_labels, labels, i, j, N, M, offset, LABELS: tl.constexpr):
    # the pairs that count: all, or the positive and those of other labels
    keep = (i < N)[:, None] & (j < M)[None, :]
    if LABELS:
        own = tl.load(row_labels + i, i < N, other=0)
        others = tl.load(labels + j, j < M, other=0)
        positive = (offset + i)[:, None] == j[None, :]
        keep = keep & (positive | (own[:, None] != others[None, :]))
    return keep


@triton.jit
def _factor(a, i, N, SCALED: tl.constexpr):
    # of each row, or of all pairs
    return tl.load(a + i, i < N, other=1.0)[:, None] if SCALED else tl.load(a)


@triton.jit
def _scaled(products, factor, b, j, M, SCALED: tl.constexpr):
    s = products * factor
    return s * tl.load(b + j, j < M, other=1.0)[None, :] if SCALED else s


@triton.jit
def _of_columns(values, GROUPS: tl.constexpr):
    # sums of the columns over each of GROUPS of rows: a warp's, which waits for no other
    N: tl.constexpr = values.shape[0]
    M: tl.constexpr = values.shape[1]
    return tl.sum(tl.sum(values.reshape(N // (16 * GROUPS), GROUPS, 16, M), 0), 1)


@triton.jit
def _of_rows(values):
    # sums of the rows over each 4th pair of columns: a thread's
    N: tl.constexpr = values.shape[0]
    M: tl.constexpr = values.shape[1]
    return tl.sum(tl.sum(values.reshape(N, M // 8, 4, 2), 3), 1)


@triton.jit(do_not_specialize=["N", "offset", "parts", "tuned_for"])
def _stats_kernel(x, y, a, b, row_labels, labels, row, column, positive, N, M, D, offset, part,
                  parts, tuned_for, LABELS: tl.constexpr, COLUMNS: tl.constexpr,
                  SCALED: tl.constexpr, SUMS: tl.constexpr, SHARED: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_D: tl.constexpr, HALVINGS: tl.constexpr,
                  GROUPS: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_M >> HALVINGS
    PIECES: tl.constexpr = 2**HALVINGS
    strips = tl.cdiv(N, BLOCK_N)
    strip, piece = tl.program_id(0) % strips, tl.program_id(0) // strips
    i0, end = strip * BLOCK_N, tl.minimum(M, (piece + 1) * part)
    i = i0 + tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), NOTHING, tl.float32)
    exps = tl.zeros((BLOCK_N,), tl.float32)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    plain = tl.zeros((BLOCK_N,), tl.float32)
    shared = NOTHING
    # row [.., parts, N], column [strips, M] and [.., strips, GROUPS, M]
    row_plane, column_plane = tl.cast(parts, tl.int64) * N, tl.cast(strips, tl.int64) * GROUPS * M
    high_at = column + tl.cast(strip, tl.int64) * M
    sums_at = column + (tl.cast(strips, tl.int64) + strip * GROUPS + tl.arange(0, GROUPS)) * M
    for start in range(piece * part, end, BLOCK_M):
        products = row_products(x, y, i0, start, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
        factor = _factor(a, i, N, SCALED)
        apart = True
        if SHARED & (SUMS == 2) & (not LABELS):
            whole = (i0 + BLOCK_N <= N) & (start + BLOCK_M <= end)
            if whole & (not _crosses(i0, start, offset, BLOCK_N, BLOCK_M)):
                if shared == NOTHING:
                    j = start + tl.arange(0, WIDTH)
                    s = _scaled(_piece(products, 0, HALVINGS), factor, b, j, M, SCALED)
                    shared = tl.max(tl.max(s, 1), 0)
                of_rows = tl.zeros((BLOCK_N, 4), tl.float32)
                least = tl.full((GROUPS, WIDTH), _reach(x), tl.float32)
                for k in tl.static_range(PIECES):
                    j = start + k * WIDTH + tl.arange(0, WIDTH)
                    s = _scaled(_piece(products, k, HALVINGS), factor, b, j, M, SCALED)
                    e = _exp(s - shared)
                    of_rows += _of_rows(e)
                    if COLUMNS:
                        of_columns = _of_columns(e, GROUPS)
                        tl.store(high_at + j, tl.full((WIDTH,), 0.0, tl.float32) + shared)
                        tl.store(sums_at[:, None] + j[None, :], of_columns)
                        least = tl.minimum(least, of_columns)
                sums = tl.sum(of_rows, 1)
                furthest = tl.max(tl.maximum(sums, 1 / sums), 0)
                if tl.maximum(furthest, 1 / tl.min(tl.min(least, 1), 0)) < _reach(x):
                    before, top = top, tl.maximum(top, shared)
                    exps = exps * _exp(before - top) + sums * _exp(shared - top)
                    apart = False
        if apart:
            for k in tl.static_range(PIECES):
                j0 = start + k * WIDTH
                j = j0 + tl.arange(0, WIDTH)
                s = _scaled(_piece(products, k, HALVINGS), factor, b, j, M, SCALED)
                if _crosses(i0, j0, offset, BLOCK_N, WIDTH):
                    target = offset + i
                    found = (i < N) & (target >= j0) & (target < tl.minimum(end, j0 + WIDTH))
                    own = tl.where(target[:, None] == j[None, :], s, 0.0)
                    tl.store(positive + i, tl.sum(own, 1), found)
                if LABELS | (i0 + BLOCK_N > N) | (j0 + WIDTH > end):
                    keep = _kept(row_labels, labels, i, j, N, end, offset, LABELS)
                    s = tl.where(keep, s, NOTHING)
                before, top = top, tl.maximum(top, tl.max(s, 1))
                e = _exp(s - top[:, None])
                less = _exp(before - top)
                exps = exps * less + tl.sum(e, 1)
                if SUMS > 2:
                    dots = dots * less + tl.sum(e * s, 1)
                if SUMS > 3:
                    plain += tl.sum(tl.where(s == NOTHING, 0.0, s), 1)
                if COLUMNS:
                    here = (j < end)[None, :]
                    at = sums_at[:, None] + j[None, :]
                    high = tl.max(s, 0)
                    tl.store(high_at + j, high, j < end)
                    e = _exp(s - high[None, :])
                    tl.store(at, _of_columns(e, GROUPS), here)
                    if SUMS > 2:
                        tl.store(at + column_plane, _of_columns(e * s, GROUPS), here)
                    if SUMS > 3:
                        linear = tl.where(s == NOTHING, 0.0, s)
                        tl.store(at + 2 * column_plane, _of_columns(linear, GROUPS), here)
    at = row + tl.cast(piece, tl.int64) * N + i
    tl.store(at, top, i < N)
    tl.store(at + row_plane, exps, i < N)
    if SUMS > 2:
        tl.store(at + 2 * row_plane, dots, i < N)
    if SUMS > 3:
        tl.store(at + 3 * row_plane, plain, i < N)


_stats = tuned(_stats_kernel, CONFIGS, "SUMS")

Partial = tuple[Tensor, int, int]


def stats(x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, row_labels: Tensor | None,
          labels: Tensor | None, offset: int, programs: int, columns: bool, count: int,
          precision: str) -> tuple[Partial, Partial | None, Tensor]:  # fmt: skip
    """Sums of the rows and columns of x [N, D] and y [M, D], each over parts of their logits.

    a [N] and b [M]: factors, or [1] and None. count: how many sums, 2 without those of e s, 4 with
    those of s; unless they are 2, the references are maxima.

    Returns:
        row and column (or None): what `merge` takes, references and sums [.., N or M], of how many
        parts, and how many sums a part has of each; positive [N], 0 where there is none.
    """
    (N, D), M, launched = x.shape, len(y), {}
    parts = triton.cdiv(programs * TALLEST, N)
    part = triton.cdiv(triton.cdiv(M, parts), PART) * PART
    parts = triton.cdiv(M, part)
    row, positive = a.new_empty(count * parts, N), a.new_zeros(N)
    room = max(_rows_of_columns(N, config.kwargs, count) for config in CONFIGS)
    column = a.new_empty(room if columns else 0, M)

    def grid(tile: dict) -> tuple[int]:
        launched.update(tile)
        return (triton.cdiv(N, tile["BLOCK_N"]) * parts,)

    _stats[grid](
        x, y, a, a if b is None else b, row_labels, labels, row, column, positive, N, M, D, offset,
        part, parts, size_class(N, M, D), labels is not None, columns, b is not None, count,
        one_reference(architecture(x)), precision,
    )  # fmt: skip
    strips, groups = triton.cdiv(N, launched["BLOCK_N"]), launched["GROUPS"]
    return (row, parts, 1), (column, strips, groups) if columns else None, positive


def _rows_of_columns(N: int, tile: dict, count: int) -> int:
    return triton.cdiv(N, tile["BLOCK_N"]) * (1 + (count - 1) * tile["GROUPS"])


COMPILES = compiles(_stats_kernel, CANDIDATES)
