"""Modulation in four passes. Formula: fastxm/ops/modulation.py.

A tile is [positions of a plane, channels]; LAST tells which of the two is contiguous. The divisors
W (columns), K (pixels a side of a cell) are constants, so that an index costs no division.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _offsets(b, c, at, C, n, LAST: tl.constexpr):
    # of (b, at[P], c[C]) in a [B, C, n] tensor, n contiguous or C
    if LAST:
        return b * C * n + at[:, None] * C + c[None, :]
    return b * C * n + at[:, None] + c[None, :] * n


@triton.jit
def _stats_kernel(x, mean, var, B, C, n, length, parts, c_tiles, LAST: tl.constexpr,
                  ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # a program owns BLOCK_C channels of one piece of `length` positions
    pid = tl.program_id(0).to(tl.int64)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    piece, b = pid // c_tiles % parts, pid // c_tiles // parts
    p = tl.arange(0, BLOCK_P)
    at = x + _offsets(b, c, piece * length + p, C, n, LAST)
    stride = (BLOCK_P * C) if LAST else BLOCK_P
    # moments about the mean of the first tile: a mean far from zero costs no digits
    mask = (p < length)[:, None] & (c < C)[None, :]
    first = tl.sum(tl.load(at, mask, other=0.0).to(ACC), 0) / tl.cast(
        tl.minimum(length, BLOCK_P), ACC
    )
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    square = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, length, BLOCK_P):
        mask = (start + p < length)[:, None] & (c < C)[None, :]
        d = tl.load(at, mask, other=0.0).to(ACC) - first[None, :]
        d = tl.where(mask, d, 0.0)
        total += d
        square += d * d
        at += stride
    shift = tl.sum(total, 0) / tl.cast(length, ACC)
    spread = tl.sum(square, 0) / tl.cast(length, ACC) - shift * shift
    out = (piece * B + b) * C + c
    tl.store(mean + out, first + shift, c < C)
    tl.store(var + out, tl.where(spread < 0, 0.0, spread), c < C)


@triton.jit
def _map_kernel(dout, x, gamma, beta, mean, rstd, p_term, q_term, out, C, n, cells, p_tiles,
                c_tiles, w, W: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr,
                RELU: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # a program owns one tile: out, or dx
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % p_tiles).to(tl.int32)
    c = pid // p_tiles % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    b = pid // p_tiles // c_tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    cell = p // W // K * w + p % W // K
    mask = (p < n)[:, None] & (c < C)[None, :]
    at = _offsets(b, c, p.to(tl.int64), C, n, LAST)
    at_cell = _offsets(b, c, cell.to(tl.int64), C, cells, LAST)
    mu = tl.load(mean + b * C + c, c < C, other=0.0)[None, :]
    r = tl.load(rstd + b * C + c, c < C, other=0.0)[None, :]
    scale = (1 + tl.load(gamma + at_cell, mask, other=0.0).to(ACC)) * r
    d = tl.load(x + at, mask, other=0.0).to(ACC) - mu
    z = d * scale + tl.load(beta + at_cell, mask, other=0.0).to(ACC)
    if BACKWARD:
        g = tl.load(dout + at, mask, other=0.0).to(ACC)
        if RELU:
            g = tl.where(z <= 0, 0.0, g)
        shift = tl.load(p_term + b * C + c, c < C, other=0.0)[None, :]
        slope = tl.load(q_term + b * C + c, c < C, other=0.0)[None, :]
        z = g * scale - shift - d * slope
    elif RELU:
        z = tl.where(z < 0, 0.0, z)
    tl.store(out + at, z.to(out.dtype.element_ty), mask)


@triton.jit
def _sums_kernel(dout, x, gamma, beta, mean, rstd, dgamma, dbeta, C, n, cells, parts, j_tiles,
                 c_tiles, w, h, B, W: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr,
                 RELU: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    # a program owns BLOCK_J cells side by side, or one piece of the rows of each
    pid = tl.program_id(0).to(tl.int64)
    j0 = (pid % j_tiles * BLOCK_J).to(tl.int32)
    i = (pid // j_tiles % h).to(tl.int32)
    c = pid // j_tiles // h % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    b = pid // j_tiles // h // c_tiles % B
    piece = (pid // j_tiles // h // c_tiles // B).to(tl.int32)
    q = tl.arange(0, BLOCK_R * BLOCK_J * BLOCK_K)
    r, j, k = q // (BLOCK_J * BLOCK_K), j0 + q // BLOCK_K % BLOCK_J, q % BLOCK_K
    mu = tl.load(mean + b * C + c, c < C, other=0.0)[None, :]
    rs = tl.load(rstd + b * C + c, c < C, other=0.0)[None, :]
    at_cell = _offsets(b, c, (i * w + j).to(tl.int64), C, cells, LAST)
    valid = (j < w)[:, None] & (c < C)[None, :]
    scale = (1 + tl.load(gamma + at_cell, valid, other=0.0).to(ACC)) * rs
    shift = tl.load(beta + at_cell, valid, other=0.0).to(ACC)
    total = tl.zeros((BLOCK_R * BLOCK_J * BLOCK_K, BLOCK_C), ACC)
    dot = tl.zeros((BLOCK_R * BLOCK_J * BLOCK_K, BLOCK_C), ACC)
    rows = K // parts
    for row in range(0, rows, BLOCK_R):
        for column in range(0, K, BLOCK_K):
            inside = (row + r < rows) & (column + k < K)
            mask = inside[:, None] & valid
            p = (i * K + piece * rows + row + r) * W + j * K + column + k
            at = _offsets(b, c, p.to(tl.int64), C, n, LAST)
            d = tl.load(x + at, mask, other=0.0).to(ACC) - mu
            g = tl.load(dout + at, mask, other=0.0).to(ACC)
            if RELU:
                g = tl.where(d * scale + shift <= 0, 0.0, g)
            total += g
            # not g * d where masked: d is no value of x there
            dot += tl.where(mask, g * d, 0.0)
    total = tl.sum(tl.sum(total.reshape(BLOCK_R, BLOCK_J, BLOCK_K, BLOCK_C), 2), 0)
    dot = tl.sum(tl.sum(dot.reshape(BLOCK_R, BLOCK_J, BLOCK_K, BLOCK_C), 2), 0)
    js = j0 + tl.arange(0, BLOCK_J)
    out = _offsets(piece * B + b, c, (i * w + js).to(tl.int64), C, cells, LAST)
    valid = (js < w)[:, None] & (c < C)[None, :]
    tl.store(dgamma + out, dot * rs, valid)
    tl.store(dbeta + out, total, valid)


def _tile(n: int, C: int, last: bool, size: int = 2048) -> tuple[int, int]:
    # positions and channels of a tile of at most `size` elements
    channels = min(triton.next_power_of_2(C), 128) if last else 1
    return min(triton.next_power_of_2(n), size // channels), channels


def _block(w: int, K: int, rows: int, size: int) -> tuple[int, int, int]:
    # rows, cells and columns of a cell that fill a tile
    columns = min(triton.next_power_of_2(K), size)
    cells = min(triton.next_power_of_2(w), size // columns)
    return min(triton.next_power_of_2(rows), size // columns // cells), cells, columns


def _warps(elements: int) -> int:
    return max(1, min(8, elements // 256))


def _acc(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def stats(_d, x, _g, _b, _m, _r, _p, _q, _o, mean, var, last: bool, _relu: bool, parts: int):
    """mean, var [parts, B, C] of equal pieces of each plane of x [B, C, H, W]."""
    B, C, n = *x.shape[:2], x.shape[2] * x.shape[3]
    BLOCK_P, BLOCK_C = _tile(n // parts, C, last)
    c_tiles = triton.cdiv(C, BLOCK_C)
    _stats_kernel[(B * parts * c_tiles,)](
        x, mean, var, B, C, n, n // parts, parts, c_tiles, last, _acc(mean), BLOCK_P, BLOCK_C,
        num_warps=_warps(BLOCK_P * BLOCK_C // 2),
    )  # fmt: skip


def fwd(dout, x, gamma, beta, mean, rstd, p, q, out, _f, _s, last: bool, relu: bool, _parts: int):
    """out [B, C, H, W], or dx where there is dout; gamma, beta [B, C, h, w]; the others [B, C]."""
    (B, C, H, W), (h, w) = x.shape, gamma.shape[2:]
    BLOCK_P, BLOCK_C = _tile(H * W, C, last)
    p_tiles, c_tiles = triton.cdiv(H * W, BLOCK_P), triton.cdiv(C, BLOCK_C)
    _map_kernel[(B * p_tiles * c_tiles,)](
        dout, x, gamma, beta, mean, rstd, p, q, out, C, H * W, h * w, p_tiles, c_tiles, w,
        W, W // w, last, relu, dout is not None, _acc(mean), BLOCK_P, BLOCK_C,
        num_warps=_warps(BLOCK_P * BLOCK_C),
    )  # fmt: skip


dx = fwd


def sums(dout, x, gamma, beta, mean, rstd, _p, _q, _o, dgamma, dbeta, last: bool, relu: bool,
         parts: int):  # fmt: skip
    """dgamma, dbeta [parts B, C, h, w], in memory as gamma is."""
    (B, C, H, W), (h, w) = x.shape, gamma.shape[2:]
    K, (size, BLOCK_C) = W // w, _tile(H * W, C, last)
    BLOCK_R, BLOCK_J, BLOCK_K = _block(w, K, K // parts, size)
    j_tiles, c_tiles = triton.cdiv(w, BLOCK_J), triton.cdiv(C, BLOCK_C)
    _sums_kernel[(parts * B * c_tiles * h * j_tiles,)](
        dout, x, gamma, beta, mean, rstd, dgamma, dbeta, C, H * W, h * w, parts, j_tiles, c_tiles,
        w, h, B, W, K, last, relu, _acc(mean), BLOCK_R, BLOCK_J, BLOCK_K, BLOCK_C,
        num_warps=_warps(BLOCK_R * BLOCK_J * BLOCK_K * BLOCK_C),
    )  # fmt: skip


def _compiles() -> list:
    built = []
    for last in (False, True):
        # 256 x 256 x 96 from 16 x 16, bfloat16 and float32 maps, as in the largest layer of XMC-GAN
        tile = dict(zip(("BLOCK_P", "BLOCK_C"), _tile(65536, 96, last)))
        common = {"LAST": last, "ACC": tl.float32}
        cell = {"W": 256, "K": 16, "RELU": True}
        rows, cells, columns = _block(16, 16, 16, tile["BLOCK_P"])
        block = {"BLOCK_R": rows, "BLOCK_J": cells, "BLOCK_K": columns, "BLOCK_C": tile["BLOCK_C"]}
        for x in ("*bf16:16", "*fp32:16"):
            f32 = dict.fromkeys(
                ("mean", "var", "rstd", "p_term", "q_term", "dgamma", "dbeta"), "*fp32:16"
            )
            types = {**f32, "x": x, "dout": x, "out": x, "gamma": x, "beta": "*fp32:16"}
            types |= dict.fromkeys(("C", "n", "cells", "length", "w", "h"), "i32:16")
            for kernel, constants in (
                (_stats_kernel, {**common, **tile}),
                (_stats_kernel, {**common, **tile, "length": 1}),  # maps of one place
                (_map_kernel, {**common, **cell, **tile, "BACKWARD": False}),
                (_map_kernel, {**common, **cell, **tile, "BACKWARD": True}),
                (_sums_kernel, {**common, **cell, **block}),
            ):
                names = [name for name in kernel.arg_names if name not in constants]
                signature = {name: types.get(name, "i32") for name in names}
                warps = 4 if kernel is _stats_kernel else 8
                built.append((kernel, signature, constants, {"num_warps": warps}))
    return built


COMPILES = _compiles()
