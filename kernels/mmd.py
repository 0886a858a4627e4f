"""A tile of an MMD in one kernel, from rows to gradient weights. Formula: fastxm/ops/mmd_tiles.py.

A program owns a block of the tile: it takes the products of its rows and columns, the statistic s
of each pair, the sum k of all parts of the kernel and their slopes w; of both it gives the sums of
its rows and of its columns, which are added up in a fixed order, and it writes w. No product
leaves the registers. Of a sample with itself a program also gives what the block across the
diagonal would.

The kernel is `KINDS`: two digits for each part, its kind and its degree. A Gaussian of degree 4 is
the fourth power of the part before, and takes no exponential.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .gemm import row_products

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp five


@triton.jit
def _part(s, held, shape, weight, KIND: tl.constexpr, DEGREE: tl.constexpr):
    # value and slope of one part at s, and what the next part may be a power of
    if KIND == 0:  # rbf
        if DEGREE == 4:
            held = held * held
            held = held * held
        else:
            held = tl.exp2(-shape * LOG2_E * s)
        k = weight * held
        w = 2 * shape * weight * held
    elif KIND == 1:  # rational quadratic
        u = s / (2 * shape)
        v = 1 + u
        # what rounding 1 + u left out is added to its logarithm
        k = weight * tl.exp2(-shape * LOG2_E * (tl.log(v) + (u - (v - 1)) / v))
        w = k / v
    elif KIND == 2:  # laplace
        d = tl.sqrt(s)
        k = weight * tl.exp2(-shape * LOG2_E * d)
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
                 DIAGONAL: tl.constexpr, OWN: tl.constexpr, GRADIENTS: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    blocks, strips = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    block, strip = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if OWN and strip < block:
        return
    i0, j0 = block * BLOCK_N, strip * BLOCK_M
    i, j = i0 + tl.arange(0, BLOCK_N), j0 + tl.arange(0, BLOCK_M)
    of_i, of_j = i < N, j < M
    s = row_products(x, y, i0, j0, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
    itself = i[:, None] == j[None, :]
    if RADIAL:
        norms = tl.load(x_norms + i, of_i, other=0.0)[:, None]
        norms = norms + tl.load(y_norms + j, of_j, other=0.0)[None, :]
        s = tl.maximum(norms - 2 * s, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if DIAGONAL > 0:
            s = tl.where(itself, 0.0, s)
    total, slope, held = _part(s, s, tl.load(shapes), tl.load(weights), KINDS % 10,
                               KINDS // 10 % 10)  # fmt: skip
    for q in tl.static_range(1, PARTS):
        k, w, held = _part(s, held, tl.load(shapes + q), tl.load(weights + q),
                           KINDS // 100**q % 10, KINDS // (10 * 100**q) % 10)  # fmt: skip
        total += k
        slope += w
    if DIAGONAL == 2:
        total = tl.where(itself, 0.0, total)
    # rows and columns beyond the end are the last ones again, of weight 0
    row_weight = tl.load(a + i, of_i, other=0.0)[:, None]
    column_weight = tl.load(b + j, of_j, other=0.0)[None, :]
    # row_sums [2, strips, N], column_sums [2, blocks, M]: of k, and of w; of a sample with itself
    # both are one, as the block across the diagonal has these columns as its rows
    rows = row_sums + tl.cast(strip, tl.int64) * N + i
    columns = column_sums + tl.cast(block, tl.int64) * M + j
    across = of_j
    if OWN:
        across = of_j & (j >= i0 + BLOCK_N)
    tl.store(rows, tl.sum(total * column_weight, 1), of_i)
    tl.store(columns, tl.sum(total * row_weight, 0), across)
    if GRADIENTS:
        slope *= tl.load(scales + i, of_i, other=0.0)[:, None] * column_weight
        if DIAGONAL == 2 or (RADIAL and DIAGONAL == 1):
            # rows as given and as multiplied differ: a row has no slope to itself
            slope = tl.where(itself, 0.0, slope)
        slope = slope.to(out.dtype.element_ty)
        at = out + i[:, None] * w_stride + j[None, :]
        tl.store(at, slope, of_i[:, None] & of_j[None, :])
        if OWN:
            at = out + i[:, None] + j[None, :] * w_stride
            tl.store(at, slope, of_i[:, None] & across[None, :])
        slope = slope.to(tl.float32)  # sums are those of the weights as rounded
        tl.store(rows + tl.cast(strips, tl.int64) * N, tl.sum(slope, 1), of_i)
        tl.store(columns + tl.cast(blocks, tl.int64) * M, tl.sum(slope, 0), across)


def _config(n: int, m: int, d: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def config(half: bool, own: bool, precision: str, arch: int, roots: bool) -> triton.Config:
    if knobs.runtime.interpret:
        return _config(32, 32, 32, 4, 1)
    if not half and precision == "ieee":  # no tensor cores
        return _config(64, 64, 32, 4, 3)
    # a sample with itself has square blocks; 4 warps would spill but for halves on Hopper
    warps = 4 if half and arch == 90 and not roots else 8
    return _config(64 if own else 128, 64, 64 if half else 32, warps, 3)


def tile(x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, a: Tensor, b: Tensor,
         scales: Tensor, shapes: Tensor, weights: Tensor, kinds: list[tuple[int, int]],
         radial: bool, diagonal: int, own: bool, w: Tensor | None,
         precision: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of the rows and columns of one tile, x [n, D] against y [m, D], n m < 2^31.

    Args:
        scales: [n], factors of w. shapes, weights: [parts], the shapes of Gaussians ascending.
        kinds: kind and degree of each part, degree < 10; of a Gaussian 4 if it is known to be the
            fourth power of the part before, and of no power itself: each multiplies the rounding of
            the exponential by 4.
        diagonal: what pairs i = j are: 0 like others, 1 a row with itself, 2 left out.
        own: y is x, and b a: the columns' sums are then those of the rows.
        w: [n, m] to be written, or None.

    Returns:
        [2, n] and [2, m]: sums of b k and a k, and of w, which are not written without it.
    """
    (n, D), m = x.shape, len(y)
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    roots = any(kind in (2, 3) for kind, _ in kinds)
    chosen = config(x.element_size() == 2, own, precision, 10 * major + minor, roots)
    blocks = triton.cdiv(n, chosen.kwargs["BLOCK_N"])
    strips = triton.cdiv(m, chosen.kwargs["BLOCK_M"])
    rows = a.new_empty(2, strips, n)
    columns = rows if own else a.new_empty(2, blocks, m)
    number = sum((kind + 10 * degree) * 100**q for q, (kind, degree) in enumerate(kinds))
    _tile_kernel[(blocks * strips,)](
        x, y, x_norms, y_norms, a, b, scales, shapes, weights, rows, columns, w, n, m, D,
        m if w is None else w.stride(0), number, len(kinds), radial, diagonal, own, w is not None,
        precision, **chosen.kwargs, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    of_rows = rows.sum(1)
    return of_rows, of_rows if own else columns.sum(1)


def _compiles() -> list:
    built = []
    names = ("x_norms", "y_norms", "a", "b", "scales", "shapes", "weights", "row_sums")
    types = dict.fromkeys((*names, "column_sums"), "*fp32:16")
    types |= dict.fromkeys(("N", "M", "D", "w_stride"), "i32:16")
    # five Gaussians of ratio 2 and of any, one part of the others, a polynomial of degree 3
    kernels = ((1040104010, 5, True), (1010101010, 5, True), (11, 1, True), (12, 1, True),
               (13, 1, True), (34, 1, False))  # fmt: skip
    places = ((0, False), (2, True), (1, True), (2, False))  # diagonal, own
    precisions = (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32x3"), ("fp32", "tf32"))
    for (element, precision), arch in product(precisions, (80, 90, 100)):
        types |= dict.fromkeys(("x", "y", "out"), f"*{element}:16")
        for number, parts, radial in kernels if arch == 90 else kernels[:1]:
            # all places of the first kernel, and of the others two
            for diagonal, own in places if number == kernels[0][0] else places[:2]:
                chosen = config(element == "bf16", own, precision, arch, number in (12, 13))
                options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
                constants = {"KINDS": number, "PARTS": parts, "RADIAL": radial,
                             "DIAGONAL": diagonal, "OWN": own, "GRADIENTS": True,
                             "PRECISION": precision, **chosen.kwargs}  # fmt: skip
                left = [name for name in _tile_kernel.arg_names if name not in constants]
                row = (_tile_kernel, {n: types[n] for n in left}, constants)
                built.append((*row, {**options, "archs": (arch,)}))
    return built


COMPILES = _compiles()
