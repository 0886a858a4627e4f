"""The gradient of InfoNCE's logits, which vendor products take on to x and y. Formula and letters:
fastxm/ops/info_nce.py. A program owns a tile of it.

exp(s - row) v + exp(s - column) w = exp(s - most) (exp(most - row) v + exp(most - column) w): one
exponential a pair, where log-sum-exps are near each other and no positive leaves p - 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .gemm import row_products
from .info_nce import _crosses, _exp, _factor, _kept, _piece, _reach, _scaled
from .info_nce_tiles import CANDIDATES, CONFIGS, compiles, size_class, tuned


@triton.jit
def _term(column, k, j, M, COLUMNS: tl.constexpr):
    return tl.load(column + k * M + j, j < M, other=0.0)[None, :] if COLUMNS else 0.0


@triton.jit(do_not_specialize=["N", "offset", "row_stride", "tuned_for"])
def _gradient_kernel(x, y, a, b, row_labels, labels, row, column, bounds, g, N, M, D, offset,
                     row_stride, g_stride, smoothing, tuned_for, LABELS: tl.constexpr,
                     COLUMNS: tl.constexpr, SCALED: tl.constexpr, SMOOTHED: tl.constexpr,
                     PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_D: tl.constexpr, HALVINGS: tl.constexpr,
                     GROUP: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_M >> HALVINGS
    # neighbours in time share GROUP strips of rows: what they read of y stays in the cache
    tiles, strips = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles) * GROUP
    place, high = tl.program_id(0) % (GROUP * tiles), tl.minimum(strips - group, GROUP)
    i0, start = (group + place % high) * BLOCK_N, place // high * BLOCK_M
    products = row_products(x, y, i0, start, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
    i = i0 + tl.arange(0, BLOCK_N)
    row += tl.minimum(i, N - 1)
    factor = _factor(a, i, N, SCALED)
    # of rows and columns: log-sum-exp, weight of the softmax, what smoothing takes of every pair,
    # and the weight of a softmax whose reference is one for all
    most = tl.load(bounds)
    near = _exp(most - tl.load(bounds + 1)) < _reach(x)
    for k in tl.static_range(2**HALVINGS):
        j0 = start + k * WIDTH
        j = j0 + tl.arange(0, WIDTH)
        piece = _piece(products, k, HALVINGS)
        positive = _crosses(i0, j0, offset, BLOCK_N, WIDTH)
        if near & (not positive):
            both = tl.load(row + 3 * row_stride)[:, None] + _term(column, 3, j, M, COLUMNS)
            ds = _exp(_scaled(piece, factor, b, j, M, SCALED) - most) * both
        else:
            s = _scaled(piece, factor, b, j, M, SCALED)
            weight, other = tl.load(row + row_stride)[:, None], _term(column, 1, j, M, COLUMNS)
            ds = _exp(s - tl.load(row)[:, None]) * weight
            if COLUMNS:
                ds += _exp(s - _term(column, 0, j, M, COLUMNS)) * other
            if positive:
                hit = (weight + other) * (1 - smoothing)
                ds -= tl.where((offset + i)[:, None] == j[None, :], hit, 0.0)
        if SMOOTHED:
            ds -= tl.load(row + 2 * row_stride)[:, None] + _term(column, 2, j, M, COLUMNS)
        if LABELS:
            keep = _kept(row_labels, labels, i, j, N, M, offset, LABELS)
            ds = tl.where(keep, ds, 0.0)
        if SCALED:
            ds = _scaled(ds, factor, b, j, M, SCALED)
        at = g + tl.cast(i, tl.int64)[:, None] * g_stride + j[None, :]
        tl.store(at, ds.to(g.dtype.element_ty), (i < N)[:, None] & (j < M)[None, :])


def _wide(config: triton.Config) -> triton.Config:
    # nothing is summed here, and wider pieces are stored in longer rows
    tile = {k: v for k, v in config.kwargs.items() if k != "GROUPS"}
    tile["HALVINGS"] = max(1, (tile["BLOCK_M"] // 128).bit_length())
    return triton.Config(tile, num_warps=config.num_warps, num_stages=config.num_stages)


_gradient = tuned(_gradient_kernel, [_wide(config) for config in CONFIGS])


def gradient(x: Tensor, y: Tensor, a: Tensor, b: Tensor | None, row_labels: Tensor | None,
             labels: Tensor | None, row: Tensor, column: Tensor | None, bounds: Tensor, g: Tensor,
             offset: int, smoothing: float, precision: str) -> None:  # fmt: skip
    """Writes g [N, M] of x [N, D] and y [M, D].

    a [N] and b [M]: factors, or [1] and None. row [4, N] and column [4, M]: terms, and weights of
    exp(s - bounds[0]). bounds [2]: the largest and the least of all log-sum-exps.
    """
    (N, D), M = x.shape, len(y)
    _gradient[lambda tile: (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"]),)](
        x, y, a, a if b is None else b, row_labels, labels, row, column, bounds, g, N, M, D, offset,
        row.stride(0), g.stride(0), smoothing, size_class(N, M, D), labels is not None,
        column is not None, b is not None, smoothing > 0, precision, GROUP=8,
    )  # fmt: skip


COMPILES = compiles(_gradient_kernel, [_wide(config) for config in CANDIDATES])
