"""A tile of an MMD in one kernel, from rows to gradient weights. Formula: fastxm/ops/mmd_tiles.py.

A program owns a block of the tile: it takes the products of its rows and columns, the statistic s
of each pair, the sum k of all parts of the kernel and their slopes w; of both it gives the sums of
its rows and of its columns, which are added up in a fixed order, and it writes w. No product
leaves the registers.

The kernel is `KINDS`: two digits for each part, its kind and its degree. A Gaussian that is the
fourth power of the part before takes no exponential, unless that was a power itself: each
multiplies the rounding of the exponential by 4.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .gemm import row_products


@triton.jit
def _part(s, held, power, shape, weight, KIND: tl.constexpr, DEGREE: tl.constexpr):
    # value and slope of one part at s, and what the next part may be a power of
    if KIND == 0:  # rbf
        if power:
            held = held * held
            held = held * held
        else:
            held = tl.exp(-shape * s)
        k = weight * held
        w = 2 * shape * k
    elif KIND == 1:  # rational quadratic
        u = s / (2 * shape)
        v = 1 + u
        # what rounding 1 + u left out is added to its logarithm
        k = weight * tl.exp(-shape * (tl.log(v) + (u - (v - 1)) / v))
        w = k / v
    elif KIND == 2:  # laplace
        d = tl.sqrt(s)
        k = weight * tl.exp(-shape * d)
        w = tl.where(d == 0, 0.0, shape * k / tl.where(d == 0, 1.0, d))
    elif KIND == 3:  # energy
        d = tl.sqrt(s)
        k = -shape * weight * d
        w = tl.where(d == 0, 0.0, shape * weight / tl.where(d == 0, 1.0, d))
    else:  # polynomial
        base = shape * s + weight
        k = base
        w = tl.full(s.shape, 1.0, tl.float32)
        for _ in tl.static_range(DEGREE - 1):
            w = w * base
            k = k * base
        w = DEGREE * shape * w
    return k, w, held


@triton.jit
def _tile_kernel(x, y, x_norms, y_norms, a, b, scales, shapes, weights, row_sums, column_sums, out,
                 N, M, D, w_stride, KINDS: tl.constexpr, PARTS: tl.constexpr, RADIAL: tl.constexpr,
                 DIAGONAL: tl.constexpr, GRADIENTS: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    blocks, strips = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    i0 = tl.program_id(0) % blocks * BLOCK_N
    j0 = tl.program_id(0) // blocks * BLOCK_M
    i, j = i0 + tl.arange(0, BLOCK_N), j0 + tl.arange(0, BLOCK_M)
    s = row_products(x, y, i0, j0, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
    if RADIAL:
        norms = tl.load(x_norms + i, i < N, other=0.0)[:, None]
        norms = norms + tl.load(y_norms + j, j < M, other=0.0)[None, :]
        s = tl.maximum(norms - 2 * s, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if DIAGONAL > 0:
            s = tl.where(i[:, None] == j[None, :], 0.0, s)
    held = s
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    slope = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    power, before = False, 0.0
    for q in tl.static_range(PARTS):
        shape, weight = tl.load(shapes + q), tl.load(weights + q)
        power = (shape == 4 * before) & (not power)
        k, w, held = _part(s, held, power, shape, weight, KINDS // 100**q % 10,
                           KINDS // (10 * 100**q) % 10)  # fmt: skip
        before = shape
        total += k
        slope += w
    keep = (i < N)[:, None] & (j < M)[None, :]
    if DIAGONAL == 2:
        keep = keep & (i[:, None] != j[None, :])
    total = tl.where(keep, total, 0.0)
    row_weight = tl.load(a + i, i < N, other=0.0)[:, None]
    column_weight = tl.load(b + j, j < M, other=0.0)[None, :]
    # row_sums [2, strips, N], column_sums [2, blocks, M]: of k, and of w
    rows = row_sums + tl.cast(tl.program_id(0) // blocks, tl.int64) * N + i
    columns = column_sums + tl.cast(tl.program_id(0) % blocks, tl.int64) * M + j
    tl.store(rows, tl.sum(total * column_weight, 1), i < N)
    tl.store(columns, tl.sum(total * row_weight, 0), j < M)
    if GRADIENTS:
        scale = tl.load(scales + i, i < N, other=0.0)[:, None]
        if RADIAL and DIAGONAL == 1:  # rows as given and as multiplied differ: none to itself
            keep = keep & (i[:, None] != j[None, :])
        slope = tl.where(keep, slope * scale * column_weight, 0.0).to(out.dtype.element_ty)
        at = out + tl.cast(i, tl.int64)[:, None] * w_stride + j[None, :]
        tl.store(at, slope, (i < N)[:, None] & (j < M)[None, :])
        slope = slope.to(tl.float32)  # sums are those of the weights as rounded
        tl.store(rows + tl.cast(strips, tl.int64) * N, tl.sum(slope, 1), i < N)
        tl.store(columns + tl.cast(blocks, tl.int64) * M, tl.sum(slope, 0), j < M)


def _config(n: int, m: int, d: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# of halves, and of float32
HALF, FULL = _config(64, 64, 64, 8, 3), _config(64, 64, 32, 8, 3)
TINY = _config(32, 32, 32, 4, 1)


def config(x: Tensor) -> triton.Config:
    if knobs.runtime.interpret:
        return TINY
    return HALF if x.element_size() == 2 else FULL


def tile(x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, a: Tensor, b: Tensor,
         scales: Tensor, shapes: Tensor, weights: Tensor, kinds: list[tuple[int, int]],
         radial: bool, diagonal: int, w: Tensor | None,
         precision: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of the rows and columns of one tile, x [n, D] against y [m, D].

    Args:
        scales: [n], factors of w. shapes, weights: [parts], the shapes of Gaussians ascending.
        kinds: kind and degree of each part, degree < 10.
        diagonal: what pairs i = j are: 0 like others, 1 a row with itself, 2 left out.
        w: [n, m] to be written, or None.

    Returns:
        [2, n] and [2, m]: sums of b k and a k, and of w.
    """
    (n, D), m, chosen = x.shape, len(y), config(x)
    blocks = triton.cdiv(n, chosen.kwargs["BLOCK_N"])
    strips = triton.cdiv(m, chosen.kwargs["BLOCK_M"])
    rows, columns = a.new_zeros(2, strips, n), a.new_zeros(2, blocks, m)
    number = sum((kind + 10 * degree) * 100**q for q, (kind, degree) in enumerate(kinds))
    _tile_kernel[(blocks * strips,)](
        x, y, x_norms, y_norms, a, b, scales, shapes, weights, rows, columns, w, n, m, D,
        m if w is None else w.stride(0), number, len(kinds), radial, diagonal, w is not None,
        precision, **chosen.kwargs, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return rows.sum(1), columns.sum(1)


def _compiles() -> list:
    built = []
    names = ("x_norms", "y_norms", "a", "b", "scales", "shapes", "weights", "row_sums")
    types = dict.fromkeys((*names, "column_sums"), "*fp32:16")
    types |= dict.fromkeys(("N", "M", "D", "w_stride"), "i32:16")
    kernels = ((0, 5, True), (1, 1, True), (2, 1, True), (3, 1, True), (34, 1, False))
    for element, chosen, precision in (("bf16", HALF, "ieee"), ("fp32", FULL, "tf32x3"),
                                       ("fp32", FULL, "tf32")):  # fmt: skip
        types |= dict.fromkeys(("x", "y", "out"), f"*{element}:16")
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        for number, parts, radial in kernels:
            constants = {"KINDS": number, "PARTS": parts, "RADIAL": radial, "DIAGONAL": 2,
                         "GRADIENTS": True, "PRECISION": precision, **chosen.kwargs}  # fmt: skip
            left = [name for name in _tile_kernel.arg_names if name not in constants]
            built.append((_tile_kernel, {n: types[n] for n in left}, constants, options))
    return built


COMPILES = _compiles()
