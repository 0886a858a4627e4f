"""InfoNCE in two kernels that end in registers what a matrix product begins. Formula and letters:
fastxm/ops/info_nce.py.

stats      a program owns a strip of rows and a part of the columns. Of the logits s in it, it gives
           for each row and each column a reference (their maximum), the sums of e = exp(s -
           reference) and of e s, and the sum of s.
gradient   a program owns a tile of g, which vendor products take on to x and y.

A tile of products is taken to its end in pieces of few columns, lest it needs its registers twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .gemm import row_products

NOTHING = tl.constexpr(-1e30)  # the logit of a pair that is left out: below every other


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


@triton.jit(do_not_specialize=["N", "offset", "parts", "tuned_for"])
def _stats_kernel(x, y, a, b, row_labels, labels, row, column, positive, N, M, D, offset, part,
                  parts, tuned_for, LABELS: tl.constexpr, COLUMNS: tl.constexpr,
                  TOTALS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                  HALVINGS: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_M >> HALVINGS
    strips = tl.cdiv(N, BLOCK_N)
    strip, piece = tl.program_id(0) % strips, tl.program_id(0) // strips
    i0, end = strip * BLOCK_N, tl.minimum(M, (piece + 1) * part)
    i = i0 + tl.arange(0, BLOCK_N)
    factor = tl.load(a + tl.minimum(i, N - 1))
    top = tl.full((BLOCK_N,), NOTHING, tl.float32)
    exps = tl.zeros((BLOCK_N,), tl.float32)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    plain = tl.zeros((BLOCK_N,), tl.float32)
    # row [.., parts, N], column [.., strips, M]: the next sum is a plane further
    row_plane, column_plane = tl.cast(parts, tl.int64) * N, tl.cast(strips, tl.int64) * M
    for start in range(piece * part, end, BLOCK_M):
        products = row_products(x, y, i0, start, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
        for k in tl.static_range(2**HALVINGS):
            j0 = start + k * WIDTH
            j = j0 + tl.arange(0, WIDTH)
            s = _piece(products, k, HALVINGS) * factor[:, None]
            s = s * tl.load(b + tl.minimum(j, M - 1))[None, :]
            if _crosses(i0, j0, offset, BLOCK_N, WIDTH):
                target = offset + i
                found = (i < N) & (target >= j0) & (target < tl.minimum(end, j0 + WIDTH))
                own = tl.where(target[:, None] == j[None, :], s, 0.0)
                tl.store(positive + i, tl.sum(own, 1), found)
            if LABELS | (i0 + BLOCK_N > N) | (j0 + WIDTH > end):
                keep = _kept(row_labels, labels, i, j, N, end, offset, LABELS)
                s = tl.where(keep, s, NOTHING)
            before, top = top, tl.maximum(top, tl.max(s, 1))
            e = tl.exp(s - top[:, None])
            less = tl.exp(before - top)
            exps = exps * less + tl.sum(e, 1)
            dots = dots * less + tl.sum(e * s, 1)
            if TOTALS:
                plain += tl.sum(tl.where(s == NOTHING, 0.0, s), 1)
            if COLUMNS:
                at = column + tl.cast(strip, tl.int64) * M + j
                high = tl.max(s, 0)
                tl.store(at, high, j < end)
                e = tl.exp(s - high[None, :])
                tl.store(at + column_plane, tl.sum(e, 0), j < end)
                tl.store(at + 2 * column_plane, tl.sum(e * s, 0), j < end)
                if TOTALS:
                    linear = tl.where(s == NOTHING, 0.0, s)
                    tl.store(at + 3 * column_plane, tl.sum(linear, 0), j < end)
    at = row + tl.cast(piece, tl.int64) * N + i
    tl.store(at, top, i < N)
    tl.store(at + row_plane, exps, i < N)
    tl.store(at + 2 * row_plane, dots, i < N)
    if TOTALS:
        tl.store(at + 3 * row_plane, plain, i < N)


@triton.jit(do_not_specialize=["N", "offset", "row_stride", "tuned_for"])
def _gradient_kernel(x, y, a, b, row_labels, labels, row, column, g, N, M, D, offset, row_stride,
                     g_stride, smoothing, tuned_for, LABELS: tl.constexpr, COLUMNS: tl.constexpr,
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
    here = tl.minimum(i, N - 1)
    factor = tl.load(a + here)[:, None]
    # of rows and columns: log-sum-exp, weight of the softmax, what smoothing takes of every pair
    lse = tl.load(row + here)[:, None]
    weight = tl.load(row + row_stride + here)[:, None]
    even = tl.load(row + 2 * row_stride + here)[:, None]
    for k in tl.static_range(2**HALVINGS):
        j0 = start + k * WIDTH
        j = j0 + tl.arange(0, WIDTH)
        there = tl.minimum(j, M - 1)
        column_factor = tl.load(b + there)[None, :]
        s = _piece(products, k, HALVINGS) * factor * column_factor
        ds = tl.exp(s - lse) * weight - even
        if COLUMNS:
            column_weight = tl.load(column + M + there)[None, :]
            ds += tl.exp(s - tl.load(column + there)[None, :]) * column_weight
            ds -= tl.load(column + 2 * M + there)[None, :]
        if _crosses(i0, j0, offset, BLOCK_N, WIDTH):
            hit = weight * (1 - smoothing)
            if COLUMNS:
                hit += column_weight * (1 - smoothing)
            ds -= tl.where((offset + i)[:, None] == j[None, :], hit, 0.0)
        if LABELS:
            keep = _kept(row_labels, labels, i, j, N, M, offset, LABELS)
            ds = tl.where(keep, ds, 0.0)
        ds = ds * factor * column_factor
        at = g + tl.cast(i, tl.int64)[:, None] * g_stride + j[None, :]
        tl.store(at, ds.to(g.dtype.element_ty), (i < N)[:, None] & (j < M)[None, :])


def _config(n: int, m: int, d: int, halvings: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "HALVINGS": halvings}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


CANDIDATES = [
    _config(128, 256, 64, 3, 8, 3),
    _config(256, 128, 64, 3, 8, 3),
    _config(128, 128, 64, 3, 4, 3),
    _config(128, 128, 64, 2, 8, 3),
    _config(128, 64, 64, 2, 4, 4),
    _config(128, 128, 32, 3, 8, 3),
    _config(64, 64, 32, 0, 4, 3),
]
CONFIGS = [_config(32, 32, 32, 1, 4, 1)] if knobs.runtime.interpret else CANDIDATES
SMALL = 1 << 20  # pairs
SHORTEST = min(config.kwargs["BLOCK_N"] for config in CONFIGS)
PART = 256  # columns, or a multiple: no tile crosses the border of a part


def _fits(config: triton.Config, itemsize: int, arch: int, labels: bool) -> bool:
    # a tile's rows are 128 bytes long, and so are fetched whole; tensor cores of sm_80 take their
    # operands from registers, those of float32 in three parts: room for fewer sums a thread, as
    # beside labels; few warps spill on sm_100
    tile = config.kwargs
    held = tile["BLOCK_N"] * tile["BLOCK_M"] // (32 * config.num_warps)
    room = 128 // itemsize if arch < 90 else 128 if arch < 100 else 16 * config.num_warps
    room = min(room, 64) if labels else room
    return tile["BLOCK_D"] * itemsize == 128 and held <= room


def _fitting(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    x = arguments["x"]
    major, minor = torch.cuda.get_device_capability(x.device)
    labels = arguments["labels"] is not None
    fitting = [c for c in configs if _fits(c, x.element_size(), 10 * major + minor, labels)]
    # a small problem takes less time than trying: the smallest tile, of which there are the most
    return fitting[-1:] if arguments["N"] * arguments["M"] < SMALL else fitting


# what the tiles are chosen by, beside dtypes; choices are kept on disk, beside the compiled kernels
_tuned = triton.autotune(
    CONFIGS, ["tuned_for", "LABELS", "COLUMNS", "PRECISION"],
    prune_configs_by={"early_config_prune": _fitting}, cache_results=True,
)  # fmt: skip
_stats, _gradient = _tuned(_stats_kernel), _tuned(_gradient_kernel)


def _class(N: int, M: int, D: int) -> int:
    # problems of about one size share their tiles; none of SMALL is of a class with a larger one
    return 100 * (D - 1).bit_length() + (N * M).bit_length() // 3


def stats(x: Tensor, y: Tensor, a: Tensor, b: Tensor, row_labels: Tensor | None,
          labels: Tensor | None, offset: int, programs: int, columns: bool, totals: bool,
          precision: str) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Sums of the rows and columns of x [N, D] and y [M, D], each over parts of their logits.

    Returns:
        row [3 or 4, parts, N], column [3 or 4, strips, M] (or None): maxima, sums of e, of e s and,
        if `totals`, of s; positive [N], 0 where there is none.
    """
    (N, D), M, sums = x.shape, len(y), 3 + totals
    parts = triton.cdiv(programs * SHORTEST, N)
    part = triton.cdiv(triton.cdiv(M, parts), PART) * PART
    parts = triton.cdiv(M, part)
    row, positive = a.new_empty(sums, parts, N), a.new_zeros(N)
    room = a.new_empty(sums * triton.cdiv(N, SHORTEST) * M) if columns else a
    _stats[lambda tile: (triton.cdiv(N, tile["BLOCK_N"]) * parts,)](
        x, y, a, b, row_labels, labels, row, room, positive, N, M, D, offset, part, parts,
        _class(N, M, D), labels is not None, columns, totals, precision,
    )  # fmt: skip
    if not columns:
        return row, None, positive
    strips = triton.cdiv(N, _stats.best_config.kwargs["BLOCK_N"])
    return row, room[: sums * strips * M].view(sums, strips, M), positive


def gradient(x: Tensor, y: Tensor, a: Tensor, b: Tensor, row_labels: Tensor | None,
             labels: Tensor | None, row: Tensor, column: Tensor | None, g: Tensor, offset: int,
             smoothing: float, precision: str) -> None:  # fmt: skip
    """Writes g [N, M] of x [N, D] and y [M, D]; row [3, N] and column [3, M] are their terms."""
    (N, D), M = x.shape, len(y)
    _gradient[lambda tile: (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"]),)](
        x, y, a, b, row_labels, labels, row, column, g, N, M, D, offset, row.stride(0),
        g.stride(0), smoothing, _class(N, M, D), labels is not None, column is not None, precision,
        GROUP=8,
    )  # fmt: skip


def _compiles() -> list:
    built = []
    types = {"smoothing": "fp32", "row_labels": "*i32:16", "labels": "*i32:16"}
    types |= dict.fromkeys(("a", "b", "row", "column", "positive"), "*fp32:16")
    types |= dict.fromkeys(("M", "D", "part", "g_stride"), "i32:16")
    variants = (("*bf16:16", 2, "tf32x3"), ("*fp32:16", 4, "tf32x3"), ("*fp32:16", 4, "tf32"))
    for element, itemsize, precision in variants:
        types |= dict.fromkeys(("x", "y", "g"), element)
        for tile in CANDIDATES:
            rare = {CANDIDATES[0]: (False, False), CANDIDATES[3]: (True, True)}.get(tile)
            for labels, columns in ((False, True), *([rare] if rare else [])):
                archs = [a for a in (80, 90, 100) if _fits(tile, itemsize, a, labels)]
                options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages,
                           "archs": archs}  # fmt: skip
                constants = {"LABELS": labels, "COLUMNS": columns, "TOTALS": labels,
                             "PRECISION": precision, "GROUP": 8, **tile.kwargs}  # fmt: skip
                for kernel in (_stats_kernel, _gradient_kernel):
                    fixed = {k: v for k, v in constants.items() if k in kernel.arg_names}
                    left = [name for name in kernel.arg_names if name not in fixed]
                    signature = {name: types.get(name, "i32") for name in left}
                    built.append((kernel, signature, fixed, options))
    return built


COMPILES = _compiles()
